"""Run files for `dualtok run`, as the tests need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dualtok.commands.run.step import Source, Step
from dualtok.commands.run.way import steps_of
from dualtok.config.load import parse_run
from tests.support import tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a small run whose documents are not prepared."""
    return {
        "output_dir": str(folder / "out"),
        "objective": "dual",
        "data": {"dir": str(folder / "data"), "source": str(folder / "corpus.jsonl"), "block_length": 64},
        "model": {"config": tiny_llama_config()},
        "train": {"learning_rate": 5e-3, "batch_size": 8, "steps": 2, "precision": "fp32", "evaluation_blocks": 8},
        **changes,
    }


def steps(folder: Path, **changes: Any) -> dict[str, Step]:
    """Return the steps of a small run by name."""
    run = parse_run(settings(folder, **changes))
    return {step.name: step for step in steps_of(Source(folder / "run.yaml", run))}
