"""A run on two mixed folders: scored and trained through the command line, and exactly continued after a kill."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.commands.train import open_streams
from dualtok.config.load import load_run, parse_run
from dualtok.data.mixed import load_sources
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from dualtok.data.stream.mixture import Mixture
from dualtok.distributed.ranks import ALONE
from tests.multi_rank.test_resume import kill_after_step
from tests.support import dualtok, error_line, history, measured, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 10


@pytest.fixture
def mixed(small_corpus: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a ``data`` section that mixes other passages of the same tokenizer into the small corpus, one to three."""
    texts = (text for number, text in enumerate(sotu_passages()) if 300 <= number < 400)
    section = {
        "dir": str(tmp_path / "other"),
        "source": str(write_jsonl(texts, tmp_path / "other.jsonl")),
        "tokenizer": f"{small_corpus['dir']}/tokenizer",
        "block_length": small_corpus["block_length"],
        "lanes": small_corpus["lanes"],
        "shares": {"train": 1.0},
    }
    run = parse_run({"data": section})
    prepare(run.data, progress=False)
    return {"dir": small_corpus["dir"], "mix": [{"dir": section["dir"], "weight": 0.25}]}


@pytest.mark.slow
def test_a_mixed_run_that_was_killed_is_the_undisturbed_one(mixed: dict[str, Any], tmp_path: Path) -> None:
    reference = save_model(tmp_path / "reference", seed=7, initializer_range=0.1)
    whole, broken = (
        write_run(
            tmp_path / f"{name}.yaml",
            mixed,
            model={"config": tiny_llama_config()},
            monitor={"log_every": 1},
            reference={"model": str(reference)},
            train={
                "learning_rate": 5e-3,
                "batch_size": 8,
                "gradient_accumulation": 2,
                "steps": STEPS,
                "precision": "fp32",
                "checkpoint_every": 4,
                "evaluation_blocks": 16,
            },
        )
        for name in ("whole", "broken")
    )
    run = load_run(whole)
    assert run.reference is not None
    assert "no reference losses" in error_line(dualtok("train", whole))
    succeed(dualtok("score", whole, ranks=2))
    own_scores = [json.loads(path.read_text())["files"] for path in (tmp_path / "other").glob("scores/*/scores.json")]
    assert len(own_scores) == 1
    assert {name.split("/")[0] for name in own_scores[0]} == {"train"}

    stream = open_streams(run, load_sources(run.data, "train"), ("train", "validation"), ALONE)[0]
    assert isinstance(stream, Mixture)
    batch = stream.read(range(64))
    for sample, row in enumerate(batch["reference_loss"]):
        source, own = stream.locate(sample)
        assert (row == stream.streams[source].read([own])["reference_loss"][0]).all()
        assert row.abs().sum() > 0
    assert sum(stream.locate(sample)[0] for sample in range(64)) in range(8, 25)

    succeed(dualtok("train", whole, ranks=2))
    kill_after_step(broken, 4, 2)
    assert len(history(broken)) < STEPS, "the run was not interrupted"
    succeed(dualtok("train", broken, "--resume", ranks=2))
    assert measured(broken) == measured(whole)
    assert history(whole)[-1]["step"] == STEPS
    line = error_line(dualtok("train", broken, "--resume", f"data.mix=[{{dir: {tmp_path / 'other'}, weight: 0.5}}]"))
    assert "data.mix: " in line
