"""Bad input: one clear line that names the place, exit status 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT, dualtok, error_line, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from collections.abc import Callable

TRAIN = {"learning_rate": 1e-3, "batch_size": 4, "steps": 1, "precision": "fp32"}


@pytest.fixture
def corpus_copy(small_corpus: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return the data section of a copy that a test may damage."""
    folder = tmp_path / "prepared"
    shutil.copytree(small_corpus["dir"], folder, ignore=shutil.ignore_patterns("scores"))
    return {"dir": str(folder)}


def source_cases() -> list[Any]:
    def missing(folder: Path) -> dict[str, Any]:
        return {"source": str(folder / "absent.jsonl")}

    def wrong_field(folder: Path) -> dict[str, Any]:
        (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        return {"source": str(folder / "a.jsonl"), "field": "txt"}

    def empty(folder: Path) -> dict[str, Any]:
        (folder / "a.jsonl").write_text("")
        return {"source": str(folder / "a.jsonl")}

    def not_utf8(folder: Path) -> dict[str, Any]:
        (folder / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
        return {"source": str(folder / "a.jsonl")}

    def not_json(folder: Path) -> dict[str, Any]:
        (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
        return {"source": str(folder / "a.jsonl")}

    def empty_split(folder: Path) -> dict[str, Any]:
        lines = [json.dumps({"text": f"document number {i} of a very small corpus"}) for i in range(8)]
        (folder / "a.jsonl").write_text("\n".join(lines))
        return {
            "source": str(folder / "a.jsonl"),
            "shares": {"validation": 0.0001, "train": 0.7, "reference": 0.29},
            "near_duplicate_threshold": None,
        }

    return [
        pytest.param(missing, ["absent.jsonl", "no such file"], id="missing file"),
        pytest.param(wrong_field, ["a.jsonl:1", "'txt'", "did you mean 'text'"], id="wrong field"),
        pytest.param(empty, ["a.jsonl", "empty corpus"], id="empty corpus"),
        pytest.param(not_utf8, ["a.jsonl:2", "not UTF-8"], id="invalid UTF-8"),
        pytest.param(not_json, ["a.jsonl:2", "not valid JSON"], id="malformed line"),
        pytest.param(empty_split, ["data.shares.validation", "empty"], id="empty split"),
    ]


@pytest.mark.parametrize(("source", "expected"), source_cases())
def test_prepare_names_what_is_wrong_with_the_source(
    tmp_path: Path, source: Callable[[Path], dict[str, Any]], expected: list[str]
) -> None:
    data = {"dir": str(tmp_path / "prepared"), "block_length": 16, "vocab_size": 300, **source(tmp_path)}
    line = error_line(dualtok("prepare", write_run(tmp_path / "run.yaml", data)))
    for part in expected:
        assert part in line
    assert not (tmp_path / "prepared" / "manifest.json").exists()
    assert not list(tmp_path.rglob("shard-*")), "shards were left behind"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batchsize=4", ["'train.batchsize'", "did you mean 'batch_size'"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("selection.hard_share=0.9", ["selection", "above 1"]),
        ("data.shares={train: 0.9, held_out: 0.3}", ["data.shares", "above 1"]),
        ("train.deepspeed=absent.json", ["absent.json", "no such DeepSpeed configuration"]),
    ],
)
def test_a_bad_setting_is_named(
    small_corpus: dict[str, Any], tmp_path: Path, override: str, expected: list[str]
) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train=TRAIN,
    )
    dual = ["objective=dual", "reference.model=ref"] if "selection" in override else []
    line = error_line(dualtok("train", run, override, *dual))
    for part in expected:
        assert part in line
    assert not (tmp_path / "run").exists(), "output was left behind"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_position_embeddings": 32}, ["max_position_embeddings is 32", "data.block_length is 64"]),
        ({"vocab_size": 100}, ["vocab_size is 100", "but document ", "of the split ", "holds the id "]),
        ({"hiden_size": 32}, ["model.config", "'hiden_size'"]),
        ({"model_type": "lama"}, ["model.config", "lama"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    small_corpus: dict[str, Any], tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config(**changes)},
        train=TRAIN,
    )
    line = error_line(dualtok("train", run))
    for part in expected:
        assert part in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_contradicting_deepspeed_json_names_both_places(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}')
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={**TRAIN, "deepspeed": str(tmp_path / "ds.json")},
    )
    line = error_line(dualtok("train", run))
    assert "ds.json: gradient_clipping is 0.5" in line
    assert "train.gradient_clipping" in line


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_shard_is_named(corpus_copy: dict[str, Any], tmp_path: Path, damage: str) -> None:
    shard = sorted(Path(corpus_copy["dir"], "train").glob("shard-*"))[2]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "altered" else content[:-100])
    run = write_run(
        tmp_path / "run.yaml", corpus_copy, objective="causal_lm", model={"config": tiny_llama_config()}, train=TRAIN
    )
    line = error_line(dualtok("train", run))
    assert shard.name in line
    assert ("checksum" if damage == "altered" else "bytes") in line


def test_missing_and_foreign_scores_are_refused(corpus_copy: dict[str, Any], tmp_path: Path) -> None:
    first, second = (save_model(tmp_path / name, seed) for name, seed in (("first", 1), ("second", 2)))
    run = write_run(
        tmp_path / "run.yaml",
        corpus_copy,
        model={"config": tiny_llama_config()},
        train=TRAIN,
        reference={"model": str(first)},
    )
    assert "run `dualtok score`" in error_line(dualtok("train", run))

    succeed(dualtok("score", run))
    line = error_line(dualtok("train", run, f"reference.model={second}"))
    assert f"those of {first} differ in: weights" in line
    assert "precision" in error_line(dualtok("train", run, "reference.precision=bf16"))

    (score,) = Path(corpus_copy["dir"], "scores").glob("*/train/shard-00003-*")
    content = bytearray(score.read_bytes())
    content[len(content) // 2] ^= 1
    score.write_bytes(content)
    line = error_line(dualtok("train", run))
    assert score.name in line
    assert "altered" in line
    score.unlink()
    assert f"train/{score.name}: no reference losses for shard" in error_line(dualtok("train", run))


@pytest.mark.slow
def test_a_batch_above_the_data(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"short document {i}"}) for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = {
        "dir": str(tmp_path / "prepared"),
        "source": str(tmp_path / "a.jsonl"),
        "block_length": 128,
        "vocab_size": 300,
        "shares": {"train": 0.6, "reference": 0.2, "validation": 0.2},
        "near_duplicate_threshold": None,
    }
    run = write_run(
        tmp_path / "run.yaml", data, objective="causal_lm", model={"config": tiny_llama_config()}, train=TRAIN
    )
    succeed(dualtok("prepare", run))
    result = dualtok("train", run, ranks=2)
    assert result.returncode != 0
    assert str(ROOT / "dualtok") not in result.stderr, (
        "a rank printed a traceback (the launcher's own is its way to fail)"
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("dualtok: error:")]
    assert len(lines) == 1
    assert "train.batch_size: 4 blocks, but the split 'train' has 1" in lines[0]
    assert "exitcode  : 2" in result.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "cpu", "model": "m", "deepspeed": "z.json"}, ["reference.deepspeed", "no effect with mode 'cpu'"]),
        ({"mode": "offload"}, ["reference.model: missing"]),
        ({"mode": "adapter"}, ["'adapter' needs the section model.lora"]),
        ({"mode": "cpu", "model": "/absent/model"}, ["/absent/model: neither a model folder nor a hub model"]),
    ],
)
def test_a_live_reference_that_cannot_be_is_named(
    small_corpus: dict[str, Any], tmp_path: Path, settings: dict[str, Any], expected: list[str]
) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        model={"config": tiny_llama_config()},
        train=TRAIN,
        reference=settings,
    )
    line = error_line(dualtok("train", run, timeout=60))
    for part in expected:
        assert part in line
    assert not (tmp_path / "run").exists(), "output was left behind"


def test_a_live_reference_needs_no_scores(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.yaml", {"dir": small_corpus["dir"]}, reference={"mode": "cpu", "model": "m"})
    assert "there is nothing to score" in error_line(dualtok("score", run))


@pytest.mark.slow
def test_a_reference_with_another_vocabulary_stops_every_rank(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small = save_model(tmp_path / "small", seed=0, vocab_size=100)
    other = save_model(tmp_path / "other", seed=0)  # as many ids, but they mean other tokens
    tokenizer = AutoTokenizer.from_pretrained(Path(small_corpus["dir"]) / "tokenizer")
    tokenizer.save_pretrained(other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for model, expected in ((small, "vocab_size is 100"), (other, "its tokenizer has another vocabulary")):
        run = write_run(
            tmp_path / "run.yaml",
            {"dir": small_corpus["dir"]},
            model={"config": tiny_llama_config()},
            train=TRAIN,
            reference={"mode": "offload", "model": str(model)},
        )
        result = dualtok("train", run, ranks=2, timeout=60)
        lines = [line for line in result.stderr.splitlines() if line.startswith("dualtok: error:")]
        assert len(lines) == 1
        assert expected in lines[0]
        assert "exitcode  : 2" in result.stderr
