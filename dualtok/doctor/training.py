"""Two steps of real training: a tiny model in the run's engine, DeepSpeed settings, precision and loss kernel."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dualtok.config.data import DataConfig
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import write_jsonl
from dualtok.doctor.result import CheckResult
from dualtok.errors import DualtokError
from dualtok.files import write_text
from dualtok.train.checkpoints.writer import find_checkpoint
from dualtok.train.history import read_history

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualtok.config.run import RunConfig
    from dualtok.doctor.rank_job import Ended

# Imported where they are used, for what they take to load: torch (1 s), transformers (1 to 4 s).

NAME = "training"
STEPS = 2
DOCUMENTS, WORDS, VOCABULARY, BLOCK = 120, 60, 300, 32
ACCUMULATION = 2
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * BLOCK,
}
KEPT = ("engine", "pipeline", "deepspeed", "precision", "loss_backend")
"""Settings of the section ``train`` that are the run's own."""


def check_training(
    folder: Path, run: RunConfig | None, ranks: int, start: Callable[[list[str]], Sequence[Ended]]
) -> CheckResult:
    """Train a tiny model for two steps and write its checkpoint.

    Args:
        folder: where the ranks write; all hosts must see it. Text is made up there.
        run: whose layout is tried; None takes the defaults.
        ranks: of the whole job.
        start: starts ``dualtok ARGUMENTS`` on all ranks and waits; one result per host.
    """
    train = None if run is None else run.train
    if train is not None and ranks % train.stages:
        return CheckResult(NAME, "not-run", f"{train.stages} pipeline stages cannot share the {ranks} ranks here")
    started = time.monotonic()
    try:
        file, tiny = _write_run(folder, run, ranks)
    except DualtokError as error:
        return CheckResult(NAME, "fail", str(error), "fix what the message names")
    ended = start(["train", str(file)])
    words = f"{STEPS} steps of a tiny model with objective {tiny['objective']} on {ranks} ranks, {_layout(run)}"
    found, remedy = _outcome(ended, Path(tiny["output_dir"]))
    if remedy:
        return CheckResult(NAME, "fail", f"{words}: {found}", remedy)
    return CheckResult(NAME, "ok", f"{words}: {found}, {time.monotonic() - started:.0f} s")


def _outcome(ended: Sequence[Ended], output: Path) -> tuple[str, str]:
    """Return what came out and, if it is not what it should be, the remedy."""
    failed = next((host for host in ended if host.status), None)
    if failed is not None:
        return failed.last_error_line(), "fix what the message names; `dualtok train` with this run would end alike"
    late = next((host for host in ended if host.status is None), None)
    if late is not None:
        return (
            f"no end before the deadline; last line: {late.last_error_line()}",
            "the ranks wait for each other: see the checks above, and the interfaces",
        )
    losses = [row["loss"] for row in read_history(output / "metrics.jsonl")]
    shown = f"losses {', '.join(f'{loss:.3f}' for loss in losses)}"
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        return shown, "look at the checks of collectives and gradients"
    try:
        find_checkpoint(output / "checkpoints")
    except DualtokError as error:
        return str(error), "use a folder that every host sees and can write"
    return f"{shown}, checkpoint complete", ""


def _layout(run: RunConfig | None) -> str:
    if run is None or run.train is None:
        return "engine zero, bf16"
    return f"engine {run.train.engine}, {run.train.deepspeed or 'no DeepSpeed JSON'}, {run.train.precision}"


def _write_run(folder: Path, run: RunConfig | None, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Prepare made-up text and write the tiny run's YAML file; returns its path and content."""
    train = None if run is None else run.train
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(200)]
    source = write_jsonl((" ".join(draw.choices(words, k=WORDS)) for _ in range(DOCUMENTS)), folder / "text.jsonl")
    data: dict[str, Any] = {
        "dir": str(folder / "prepared"),
        "source": str(source),
        "block_length": BLOCK,
        "lanes": 4,
        "vocab_size": VOCABULARY,
        "near_duplicate_threshold": None,
    }
    prepare(DataConfig(**data), progress=False)
    section: dict[str, Any] = {
        "learning_rate": 1e-3,
        "steps": STEPS,
        "batch_size": 2 * ACCUMULATION * ranks,
        "evaluation_blocks": 4,
        "gradient_accumulation": ACCUMULATION,
        "checkpoint_every": STEPS,
    }
    settings = {} if run is None else run.as_dict()
    if train is not None:
        section |= {key: settings["train"][key] for key in KEPT}
        if section["pipeline"] is not None:
            section["pipeline"]["balance"] = "layers"  # a list would be one of the run's own layers
    layers = max(2, 1 if train is None else train.stages)
    tiny: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "data": data,
        "objective": "dual",
        "model": {"config": {**TINY, "num_hidden_layers": layers}},
        "train": section,
        "monitor": {"tensorboard": False, "hang_seconds": 600},
        "selection": {"tau": 10.0},
    }
    if section.get("engine") == "opacus":
        tiny |= {"objective": "causal_lm", "selection": None, "privacy": {"epsilon": 8.0, "delta": 1e-3}}
    else:
        mode = "resident" if run is None or run.reference is None else run.reference.mode
        tiny["reference"] = {
            "model": str(_write_reference(folder, layers)),
            "mode": mode if mode in ("offload", "cpu") else "resident",
        }
    file = folder / "run.yaml"
    write_text(file, yaml.safe_dump(tiny, sort_keys=False))
    return file, tiny


def _write_reference(folder: Path, layers: int) -> Path:
    """Write a reference model: another draw of the same kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {**TINY, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "reference")
    return folder / "reference"
