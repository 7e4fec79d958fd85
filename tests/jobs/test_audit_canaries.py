"""Canaries end to end: a small model that learned the included ones by heart, and one that was never trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dualtok.data.config import DataConfig
from dualtok.data.corpora import sotu_passages, write_jsonl
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare import prepare
from tests.support import dualtok, save_model, succeed, tiny_llama_config, write_run

COUNT = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the section of a folder with few and short documents and 120 canaries."""
    folder = tmp_path_factory.mktemp("canaries")
    passages = [next(passages)[:120] for passages in [sotu_passages()] for _ in range(140)]
    section: dict[str, Any] = {
        "dir": str(folder / "prepared"), "source": str(write_jsonl(passages, folder / "short.jsonl")),
        "block_length": 64, "lanes": 4, "vocab_size": 400, "processes": 1,
        "shares": {"train": 0.2, "reference": 0.3, "attack_reference": 0.1, "validation": 0.1, "held_out": 0.3},
        "canaries": {"count": COUNT, "length": 5, "seed": 3},
    }  # fmt: skip
    prepare(DataConfig(**section), progress=False)
    return section


@pytest.mark.slow
def test_what_was_learned_by_heart_is_found_and_an_untrained_model_gives_nothing_away(
    data: dict[str, Any], tmp_path: Path
) -> None:
    model = {"config": tiny_llama_config(hidden_size=64, intermediate_size=128, vocab_size=400)}
    train = {"precision": "fp32", "learning_rate": 5e-3, "batch_size": 16, "steps": 250, "evaluate_every": 1000}
    run = write_run(tmp_path / "plain.yaml", data, objective="causal_lm", model=model, train=train)
    succeed(dualtok("train", run))
    succeed(dualtok("export", tmp_path / "plain", tmp_path / "learned", "--checkpoint", "latest"))
    models = {"learned": str(tmp_path / "learned"),
              "fresh": str(save_model(tmp_path / "fresh", 1, vocab_size=400))}  # fmt: skip
    audit = {"models": models, "attack_reference": str(save_model(tmp_path / "other", 2, vocab_size=400)),
             "fpr_targets": [0.2], "bootstrap_resamples": 200, "canary_candidates": 60}  # fmt: skip
    audited = write_run(tmp_path / "audit.yaml", {"dir": data["dir"]}, audit=audit)
    shown = succeed(dualtok("audit", audited))
    print(shown)
    figures = json.loads((tmp_path / "audit" / "audit" / "audit.json").read_text())
    print(json.dumps([m["canaries"] for m in figures["models"]])[:3000])
