"""Export: the very weights that were trained, from every ZeRO stage, as a folder that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualtok.data.manifest import load_manifest
from dualtok.data.stream import BlockStream
from tests.support import (
    deepspeed_json,
    dualtok,
    error_line,
    read_weights,
    relative_distance,
    succeed,
    tiny_llama_config,
    write_run,
)

VALIDATION_BLOCKS = 128
"""No fewer than the small corpus has, so that an evaluation reads them all."""
CASES = [
    ("zero0", "fp32", 1), ("zero1", "fp32", 2), ("zero2", "fp32", 2), ("zero3", "fp32", 2),
    ("zero3_offload", "fp32", 2),
    ("zero1", "bf16", 2), ("zero2", "bf16", 2), ("zero3", "bf16", 2),
]  # fmt: skip


def trained(small_corpus: dict[str, Any], path: Path, json_name: str, precision: str, ranks: int, **model: Any) -> Path:
    """Train a few steps and return the run's folder."""
    run = write_run(
        path, {"dir": small_corpus["dir"]}, objective="causal_lm", model={"config": tiny_llama_config(**model)},
        train={"learning_rate": 5e-3, "batch_size": 8, "steps": 3, "precision": precision,
               "evaluation_blocks": VALIDATION_BLOCKS, "deepspeed": deepspeed_json(json_name)},
    )  # fmt: skip
    succeed(dualtok("train", run, ranks=ranks))
    return path.with_suffix("")


@torch.no_grad()
def validation_loss(small_corpus: dict[str, Any], model: Path, dtype: torch.dtype) -> float:
    """Return transformers' own mean loss on the validation blocks that training evaluated."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    total = tokens = 0.0
    for batch, _ in BlockStream(small_corpus["dir"], "validation", seed=0).sequential(8):
        logits = causal_lm(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").double()
        total, tokens = total + float(loss.sum()), tokens + int((batch["labels"] != -100).sum())
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize(("json_name", "precision", "ranks"), CASES)
def test_the_exported_model_has_the_loss_that_training_saw(
    small_corpus: dict[str, Any], tmp_path: Path, json_name: str, precision: str, ranks: int
) -> None:
    folder = trained(small_corpus, tmp_path / "run.yaml", json_name, precision, ranks)
    succeed(dualtok("export", folder, tmp_path / "hf", "--checkpoint", "latest"))
    evaluation = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    found = validation_loss(small_corpus, tmp_path / "hf", dtype)
    assert load_manifest(small_corpus["dir"]).splits["validation"].blocks <= VALIDATION_BLOCKS
    assert found == pytest.approx(evaluation["validation_loss"], rel=1e-5 if precision == "fp32" else 2e-3)
    weights = read_weights(tmp_path / "hf")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values()), "master weights are fp32"
    assert "lm_head.weight" not in weights, "a tied head must be stored once"
    start = read_weights(folder / "start")
    assert weights.keys() == start.keys()
    assert all(not torch.equal(weights[name], start[name]) for name in weights if "norm" not in name), "not trained"


@pytest.mark.slow
def test_untied_sharded_and_bf16_exports(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    from dualtok.jobs.export import export

    folder = trained(small_corpus, tmp_path / "run.yaml", "zero3", "fp32", 2, tie_word_embeddings=False)
    whole = export(folder, tmp_path / "whole", which="latest")
    sharded = export(folder, tmp_path / "sharded", which="latest", shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    first, second = read_weights(whole), read_weights(sharded)
    assert "lm_head.weight" in first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    loss = validation_loss(small_corpus, whole, torch.float32)
    assert validation_loss(small_corpus, sharded, torch.float32) == pytest.approx(loss, rel=1e-6)
    half = export(folder, tmp_path / "half", which="latest", precision="bf16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in read_weights(half).items():
        np.testing.assert_array_equal(tensor.float().numpy(), first[name].bfloat16().float().numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("json_name", "precision", "ranks"), [("zero3", "fp32", 2), ("zero1", "bf16", 2),
                                                               ("zero0", "fp32", 1)])  # fmt: skip
def test_a_lora_run_is_exported_as_a_peft_adapter_and_merged(
    small_corpus: dict[str, Any], tmp_path: Path, json_name: str, precision: str, ranks: int
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    run = write_run(
        tmp_path / "run.yaml", {"dir": small_corpus["dir"]}, objective="causal_lm",
        model={"config": tiny_llama_config(), "lora": {"rank": 4, "dropout": 0.1}},
        train={"learning_rate": 2e-2, "batch_size": 8, "steps": 3, "precision": precision,
               "evaluation_blocks": VALIDATION_BLOCKS, "deepspeed": deepspeed_json(json_name)},
    )  # fmt: skip
    succeed(dualtok("train", run, ranks=ranks))
    folder = tmp_path / "run"
    succeed(dualtok("export", folder, tmp_path / "adapter", "--checkpoint", "latest"))
    succeed(dualtok("export", folder, tmp_path / "merged", "--checkpoint", "latest", "--merge"))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "config.json" not in files
    # A fresh base, which peft may change: its own loading must find every weight, and give the merged model's losses.
    base = AutoModelForCausalLM.from_pretrained(folder / "start")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    loaded.save_pretrained(tmp_path / "by-peft")
    assert relative_distance(read_weights(tmp_path / "by-peft"), read_weights(tmp_path / "merged")) < 1e-7
    merged, start = read_weights(tmp_path / "merged"), read_weights(folder / "start")
    changed = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert changed == {name for name in merged if "proj" in name}, "LoRA must change every linear layer, and no other"
    evaluation = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    found = validation_loss(small_corpus, tmp_path / "merged", torch.float32)
    assert found == pytest.approx(evaluation["validation_loss"], rel=1e-5 if precision == "fp32" else 2e-3)
    assert abs(validation_loss(small_corpus, folder / "start", torch.float32) - found) > 1e-3, "nothing was learned"


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    assert "no checkpoint 'best'" in error_line(dualtok("export", tmp_path / "absent", tmp_path / "hf"))
    (tmp_path / "there").mkdir()
    assert "exists already" in error_line(dualtok("export", tmp_path / "absent", tmp_path / "there"))
    line = error_line(dualtok("export", tmp_path / "absent", tmp_path / "hf", "--precision", "fp16"))
    assert "must be fp32 or bf16" in line
    assert not (tmp_path / "hf").exists()
