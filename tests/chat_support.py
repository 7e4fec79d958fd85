"""What the tests of conversations share: templates in usual styles, a tokenizer that knows their tokens, a corpus."""

from __future__ import annotations

import json
import random
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
SPECIAL = [
    END,
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is defined %}{{ message['content'] }}{% endif %}"
    "{% if message['tool_calls'] is defined %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is defined %}{{ message['content'] }}{% endif %}"
    "{% if message['tool_calls'] is defined %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}"
    "{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' + (tools | tojson) + '<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is defined %}{{ message['content'] | trim }}{% endif %}"
    "{% if message['tool_calls'] is defined %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_MARKED = LLAMA3.replace(
    "{% if message['content'] is defined %}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endgeneration %}{% else %}{% if message['content'] is defined %}",
).replace("{{ '<|eot_id|>' }}{% endfor %}", "{{ '<|eot_id|>' }}{% endif %}{% endfor %}")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "The capital of France is Paris."},
        ]
    },
    "system and many turns": {
        "messages": [
            {"role": "system", "content": "You answer questions about the state of the union in few words."},
            {"role": "user", "content": "How is the union?"},
            {"role": "assistant", "content": "It is strong, as every year."},
            {"role": "user", "content": "And the economy?\nBriefly."},
            {"role": "assistant", "content": "It grows:\n- jobs\n- wages"},
            {"role": "user", "content": "Thank you."},
            {"role": "assistant", "content": "You are welcome."},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "How is the weather in Rome?"},
            {
                "role": "assistant",
                "content": "I look it up.",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}],
            },
            {"role": "tool", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "The sky over Rome is clear."},
        ],
        "tools": TOOLS,
    },
    "user last": {
        "messages": [
            {"role": "user", "content": "Say a word."},
            {"role": "assistant", "content": "Congress 🙂"},
            {"role": "user", "content": "Another."},
        ]
    },
}


def chat_tokenizer(template: str | None, vocabulary: int = 512) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer trained on addresses, with the special tokens of usual templates."""
    from transformers import PreTrainedTokenizerFast

    from dualtok.data.sources.corpora import sotu_passages

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator((passage[:300] for passage in islice(sotu_passages(), 100)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = template
    return tokenizer


def chat_rows(count: int, characters: int = 130) -> list[dict[str, Any]]:
    """Return conversations made of passages of the addresses: one to three answers each, most with a system prompt."""
    from dualtok.data.sources.corpora import sotu_passages

    draw = random.Random(0)
    rows = []
    passages = iter(sotu_passages())
    for number in range(count):
        messages = []
        if number % 4:
            messages.append({"role": "system", "content": "You continue addresses on the state of the union."})
        for _ in range(1 + number % 3):
            passage = next(passages)
            cut = draw.randrange(30, 60)
            messages.append({"role": "user", "content": passage[:cut].strip()})
            messages.append({"role": "assistant", "content": passage[cut:characters].strip()})
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chat_corpus(folder: Path, *, template: str = CHATML, rows: int = 240, **changes: Any) -> dict[str, Any]:
    """Prepare conversations (blocks of 128 tokens, 8 lanes) and return the section ``data``."""
    from dualtok.config.data import DataConfig
    from dualtok.data.prepare.pipeline import prepare

    chat_tokenizer(template).save_pretrained(folder / "tokenizer")
    section: dict[str, Any] = {
        "dir": str(folder / "prepared"),
        "source": str(write_rows(folder / "chat.jsonl", chat_rows(rows))),
        "tokenizer": str(folder / "tokenizer"),
        "block_length": 128,
        "lanes": 8,
        "shares": {
            "train": 0.5,
            "reference": 0.12,
            "attack_reference": 0.1,
            "auxiliary": 0.05,
            "validation": 0.1,
            "held_out": 0.13,
        },
        **changes,
    }
    prepare(DataConfig(**section), progress=False)
    return section
