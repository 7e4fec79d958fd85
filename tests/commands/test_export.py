"""Export: the very weights that were trained, from every ZeRO stage, as a folder that transformers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dualtok.commands.model_card import note_limit
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.tokenizer import load_tokenizer
from dualtok.model.check import check_model
from dualtok.model.load import load_causal_lm
from tests.support import (
    deepspeed_json,
    dualtok,
    error_line,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
)

VALIDATION_BLOCKS = 128
"""No fewer than the small corpus has, so that an evaluation reads them all."""
CASES = [
    ("zero0", "fp32", 1),
    ("zero1", "fp32", 2),
    ("zero2", "fp32", 2),
    ("zero3", "fp32", 2),
    ("zero3_offload", "fp32", 2),
    ("zero1", "bf16", 2),
    ("zero2", "bf16", 2),
    ("zero3", "bf16", 2),
]


def trained(small_corpus: dict[str, Any], path: Path, json_name: str, precision: str, ranks: int, **model: Any) -> Path:
    """Train a few steps and return the run's folder."""
    run = write_run(
        path,
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config(**model)},
        train={
            "learning_rate": 5e-3,
            "batch_size": 8,
            "steps": 3,
            "precision": precision,
            "evaluation_blocks": VALIDATION_BLOCKS,
            "deepspeed": deepspeed_json(json_name),
        },
    )
    succeed(dualtok("train", run, ranks=ranks))
    return path.with_suffix("")


@torch.no_grad()
def validation_loss(small_corpus: dict[str, Any], model: Path, dtype: torch.dtype) -> float:
    """Return transformers' own mean loss on the validation blocks that training evaluated."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    total = tokens = 0.0
    for batch, _ in DataFolder(small_corpus["dir"]).open("validation").sequential(8):
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
    from dualtok.commands.export import export

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
@pytest.mark.parametrize(
    ("kind", "layout", "precision"),
    [
        ("lora", "zero3", "fp32"),
        ("lora", "zero1", "bf16"),
        ("lora", "zero0", "fp32"),
        ("ia3", "zero3", "fp32"),
        ("ia3", "pipeline", "fp32"),
    ],
)
def test_a_run_with_adapters_is_exported_as_a_peft_adapter_and_merged(
    small_corpus: dict[str, Any], tmp_path: Path, kind: str, layout: str, precision: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config(), kind: {"rank": 4, "dropout": 0.1} if kind == "lora" else {}},
        train={
            "learning_rate": 2e-2 if kind == "lora" else 1e-1,
            "batch_size": 8,
            "steps": 3,
            "precision": precision,
            "evaluation_blocks": VALIDATION_BLOCKS,
            **(
                {"engine": "pipeline", "pipeline": {"stages": 2}}
                if layout == "pipeline"
                else {"deepspeed": deepspeed_json(layout)}
            ),
        },
    )
    succeed(dualtok("train", run, ranks=1 if layout == "zero0" else 2))
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
    adapted = ("proj",) if kind == "lora" else ("proj", "norm")
    assert changed == {name for name in merged if any(part in name for part in adapted)}
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


def base_model(folder: Path, model_type: str, small_corpus: dict[str, Any], **settings: Any) -> Path:
    """Save a tiny pretrained model with the small corpus' tokenizer, and the files that such folders have."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings}))
    model.generation_config = GenerationConfig(eos_token_id=[0, 3], do_sample=True, temperature=0.6)
    model.save_pretrained(folder)
    load_tokenizer(Path(small_corpus["dir"]) / "tokenizer").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("as you like")
    (folder / "tokenizer.model").write_bytes(b"what the fast tokenizer was made of")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    (folder / "optimizer.pt").write_bytes(b"no setting")
    return folder


def short_run(path: Path, small_corpus: dict[str, Any], model: dict[str, Any], *, steps: int = 1, **train: Any) -> Path:
    run = write_run(
        path,
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model=model,
        train={"learning_rate": 1e-3, "batch_size": 8, "steps": steps, "precision": "fp32", **train},
    )
    succeed(dualtok("train", run))
    return path.with_suffix("")


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("gpt_neox", {}), ("mixtral", MIXTRAL), ("gpt2", {"n_positions": 128}), ("gemma2", GEMMA)],
)
def test_an_export_is_what_the_base_was(
    small_corpus: dict[str, Any], tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    from dualtok.commands.export import export

    base = base_model(tmp_path / "base", model_type, small_corpus, **settings)
    attention = {"attention": "eager"} if model_type == "gemma2" else {}
    folder = short_run(tmp_path / "run.yaml", small_corpus, {"path": str(base), **attention})
    made = export(folder, tmp_path / "made", which="latest")
    before, after = read_weights(base), read_weights(made)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was trained"
    sharded = read_weights(export(folder, tmp_path / "sharded", which="latest", shard_size="20KB"))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert all(torch.equal(sharded[name], tensor) for name, tensor in after.items())
    assert load_causal_lm(made, attention=attention.get("attention", "sdpa")) is not None
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE", "tokenizer.model"):
        assert (made / name).read_bytes() == (base / name).read_bytes(), name
    assert not (made / "optimizer.pt").exists()
    assert not (made / "facts.json").exists()
    old, new = (json.loads((place / "config.json").read_text()) for place in (base, made))
    assert {key: value for key, value in new.items() if key in old} == old
    assert json.loads((made / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_model_card_tells_where_a_model_comes_from(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama", small_corpus)
    folder = short_run(tmp_path / "run.yaml", small_corpus, {"path": str(base)})
    succeed(dualtok("export", folder, tmp_path / "made"))
    card = (tmp_path / "made" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "base_model": "base",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["dualtok"],
    }
    entry = load_manifest(small_corpus["dir"]).splits["train"]
    assert f"{entry.documents:,} documents, {entry.tokens:,} tokens (split `train`)" in card
    assert "objective: `causal_lm`, 1 optimizer steps" in card
    assert "Not audited" in card
    assert str(tmp_path) not in card, "no path of this machine"

    audit = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        audit={"models": {"mine": str(tmp_path / "made")}, "attacks": ["loss"]},
    )
    succeed(dualtok("audit", audit))
    succeed(dualtok("export", folder, tmp_path / "again"))
    strongest = json.loads((folder / "audit" / "audit.json").read_text())["models"][0]["strongest"]["auc_two_sided"]
    card = (tmp_path / "again" / "README.md").read_text()
    found = [f"{strongest[part]:.3f}".removeprefix("0") for part in ("value", "low", "high")]
    assert f"| mine | {found[0]} [{found[1]}, {found[2]}] (Loss) |" in card
    assert "gate" not in card
    [index] = yaml.safe_load(card.split("---")[1])["model-index"]
    metric = index["results"][0]["metrics"][0]
    assert (index["name"], metric["name"]) == (folder.name, "membership inference AUC (strongest of 1)")
    assert metric["value"] == round(strongest["value"], 4)
    assert metric["args"]["high"] == round(strongest["high"], 4)
    assert "This model's weights are those of the row `mine`." in card
    shutil.copytree(tmp_path / "again", tmp_path / "interpolated")
    note_limit(tmp_path / "interpolated", "interpolated towards its reference: 0.500 of the way")
    mixed = (tmp_path / "interpolated" / "README.md").read_text()
    assert "model-index" not in mixed
    assert yaml.safe_load(mixed.split("---")[1])["license"] == "apache-2.0"
    assert "None of the rows is known" in mixed
    assert "0.500 of the way" in mixed
    assert "those of the row" not in mixed

    # Figures of other weights are told as such alone; what a gate said of the figures is told.
    succeed(dualtok("report", audit))
    assert "gate passed" in succeed(dualtok("gate", folder, "--max-strongest-auc", "1"))
    succeed(dualtok("export", folder, tmp_path / "half", "--precision", "bf16"))
    card = (tmp_path / "half" / "README.md").read_text()
    assert f"| mine | {found[0]} [" in card
    assert "model-index" not in card
    assert "None of the rows is known to be of exactly this model's weights." in card
    assert "gate passed: 1 figure of 1 model" in card


@pytest.mark.slow
def test_a_fresh_model_ends_its_texts(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = short_run(
        tmp_path / "run.yaml",
        small_corpus,
        {"config": tiny_llama_config(max_position_embeddings=512)},
        steps=60,
        learning_rate=1e-2,
    )
    succeed(dualtok("export", folder, tmp_path / "made", "--checkpoint", "latest"))
    tokenizer = load_tokenizer(tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    torch.manual_seed(0)
    start = torch.tensor([tokenizer("The")["input_ids"]] * 16)
    texts = model.generate(start, do_sample=True, max_new_tokens=400, pad_token_id=1)
    ended = (texts == tokenizer.eos_token_id).any(dim=1)
    assert ended.sum() >= 4, "some 190 tokens are the mean length of a document"
    assert texts.shape[1] <= 401


def test_tokens_that_a_run_gives_its_fresh_model_are_kept(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    folder = short_run(tmp_path / "run.yaml", small_corpus, {"config": tiny_llama_config(eos_token_id=7)})
    config = json.loads((folder / "start" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, None)


@pytest.mark.slow
def test_a_private_lora_run_is_merged_into_a_model_that_is_tied_as_its_base(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    """DP-SGD trains with a head of its own, which no adapter changes."""
    base = save_model(tmp_path / "base", 1, tie_word_embeddings=True)
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"path": str(base), "lora": {"rank": 4}},
        privacy={"noise_multiplier": 0.5},
        train={"learning_rate": 2e-2, "batch_size": 8, "steps": 2, "precision": "fp32", "engine": "opacus"},
    )
    succeed(dualtok("train", run))
    succeed(dualtok("export", tmp_path / "run", tmp_path / "merged", "--checkpoint", "latest", "--merge"))
    check_model(tmp_path / "merged", DataFolder(small_corpus["dir"]), origin="merged")
    start, merged = read_weights(base), read_weights(tmp_path / "merged")
    assert start.keys() == merged.keys()
    assert {name for name in start if not torch.equal(start[name], merged[name])} == {n for n in start if "proj" in n}


@pytest.mark.slow
def test_merged_experts_have_the_names_of_the_base(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "mixtral", small_corpus, **MIXTRAL)
    folder = short_run(
        tmp_path / "run.yaml",
        small_corpus,
        {"path": str(base), "lora": {"rank": 2, "targets": ["q_proj"]}},
        learning_rate=1e-1,
    )
    succeed(dualtok("export", folder, tmp_path / "made", "--merge"))
    before, after = read_weights(base), read_weights(tmp_path / "made")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name}
    assert (tmp_path / "made" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
