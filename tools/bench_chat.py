"""Documents per second of ``dualtok prepare`` on conversations, beside the same text as plain documents.

Conversations of one to four answers are written as rows of messages, and once more as texts: what the chat template
makes of them. Both are prepared with the same tokenizer in new processes, in turns, so that a busy machine slows both
alike. What starting costs is measured on a few of them and taken off. A template that marks answers by
``{% generation %}`` and one that does not, whose answers are found by prefixes, are measured each on its own.

    python tools/bench_chat.py --conversations 4000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from bench_prepare import texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
PREFIXES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"marked": MARKED, "prefixes": PREFIXES}
VOCABULARY, LEARNED_FROM = 8000, 500
FEW = 60
"""Conversations of a preparation that is nearly all start."""
Messages = list[dict[str, str]]


class Time(NamedTuple):
    """Of one preparation, in seconds."""

    wall: float
    cpu: float

    def __sub__(self, other: Time) -> Time:
        """Take the other's times off."""
        return Time(self.wall - other.wall, self.cpu - other.cpu)


def conversations(count: int) -> Iterator[Messages]:
    """Yield synthetic conversations of about 2 kB, of a system prompt and one to four answers."""
    draw = np.random.default_rng(1)
    for text in islice(texts(1e9, seed=0), count):
        words = text.split()
        parts = np.array_split(np.arange(len(words)), 2 * int(draw.integers(1, 5)))
        messages = [{"role": "system", "content": "You are a helpful assistant."}]
        for number, part in enumerate(parts):
            content = " ".join(words[i] for i in part)
            messages.append({"role": "assistant" if number % 2 else "user", "content": content})
        yield messages


def tokenizer_of(rows: list[Messages]) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer that knows the template's tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", START, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator((m["content"] for row in rows[:LEARNED_FROM] for m in row), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    return tokenizer


def prepare(folder: Path, name: str, source: Path, **settings: Any) -> Time:
    """Prepare in a new process."""
    run = folder / f"{name}.yaml"
    data = {"dir": str(folder / name), "source": str(source), "tokenizer": str(folder / "tokenizer"), **settings}
    run.write_text(yaml.safe_dump({"data": data, "output_dir": str(folder / "out")}), encoding="utf-8")
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dualtok", "prepare", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"dualtok prepare ended with status {process.returncode}")
    return Time(wall, usage.ru_utime + usage.ru_stime)


def measure(rows: list[Messages], template: str, rounds: int, folder: Path) -> list[tuple[Time, Time]]:
    """Return (conversations, texts) of each round; which of them begins changes from round to round."""
    tokenizer = tokenizer_of(rows)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "tokenizer")
    lines = {
        "chat": [json.dumps({"messages": row}) + "\n" for row in rows],
        "plain": [json.dumps({"text": tokenizer.apply_chat_template(row, tokenize=False)}) + "\n" for row in rows],
    }
    for kind, own in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(own), encoding="utf-8")
        (folder / f"{kind}-few.jsonl").write_text("".join(own[:FEW]), encoding="utf-8")
    found = []
    for number in range(rounds):
        times = {}
        for kind in ("chat", "plain") if number % 2 else ("plain", "chat"):
            same_tokens = {"special_tokens_in_text": "encode"} if kind == "plain" else {}
            start = prepare(folder, f"{kind}-few-{number}", folder / f"{kind}-few.jsonl", **same_tokens)
            times[kind] = prepare(folder, f"{kind}-{number}", folder / f"{kind}.jsonl", **same_tokens) - start
        found.append((times["chat"], times["plain"]))
    return found


def main() -> None:
    """Measure both templates and print documents per second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    options = parser.parse_args()
    rows = list(conversations(options.conversations))
    for name in options.templates:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(rows, TEMPLATES[name], options.rounds, Path(folder))
        for what in Time._fields:
            ratios = sorted(getattr(plain, what) / getattr(chat, what) for chat, plain in found)
            chat, plain = (
                (len(rows) - FEW) / statistics.median(getattr(both[kind], what) for both in found) for kind in (0, 1)
            )
            print(
                f"{name}, {what} time: {chat:,.0f} conversations/s, {plain:,.0f} texts/s; ratio "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)",
                flush=True,
            )


if __name__ == "__main__":
    main()
