"""DualTrainer and ``dualtok train`` are the same training: losses, norms and weights, step by step, on the same blocks.

Each cell of the Trainer is compared with one process of ``dualtok train`` at ZeRO-0.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dualtok.commands.export import export
from tests.support import (
    ROOT,
    command,
    dualtok,
    environment,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    write_run,
    write_small_corpus,
)

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 20
BLOCKS = 4
"""Blocks of a global micro-batch."""
WIDE = 0.25
"""Standard deviation of the first weights: losses spread over many nats, so that few scores are close to each other."""
CLIPPING = 0.5
LEARNING_RATE = 1e-3
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Cell:
    """One job of the Trainer; those of one ``launch`` share their processes."""

    name: str
    ranks: int
    accumulation: int
    launch: str
    kind: str = "trainer"
    scope: str = "micro_batch"
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    tolerance: float = 1e-5


STAGE_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
}
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}

CELLS = [
    Cell("one-1", 1, 1, "one"),
    Cell("one-4", 1, 4, "one"),
    Cell("one-4-step", 1, 4, "one", scope="step"),
    Cell("one-1-function", 1, 1, "one", kind="function"),
    Cell("two-1", 2, 1, "two"),
    Cell("two-4", 2, 4, "two"),
    Cell("two-4-step", 2, 4, "two", scope="step"),
    Cell("two-1-function", 2, 1, "two", kind="function"),
    Cell("two-1-function-own-items", 2, 1, "two", "function", arguments={"average_tokens_across_devices": False}),
    Cell("two-1-zero0", 2, 1, "zero0", arguments={"deepspeed": {**AUTO, "zero_optimization": {"stage": 0}}}),
    Cell("two-4-zero0", 2, 4, "zero0", arguments={"deepspeed": {**AUTO, "zero_optimization": {"stage": 0}}}),
    Cell("two-1-zero3", 2, 1, "zero3", arguments={"deepspeed": {**AUTO, **STAGE_3}}),
    Cell("two-4-zero3", 2, 4, "zero3", arguments={"deepspeed": {**AUTO, **STAGE_3}}),
]


def own_run(folder: Path, corpus: dict[str, Any], accumulation: int, scope: str) -> Path:
    """Write the run of ``dualtok train`` that the Trainer must equal."""
    return write_run(
        folder / f"own-{accumulation}-{scope}.yaml",
        corpus,
        seed=3,
        objective="dual",
        model={"path": str(folder / "start")},
        selection={"scope": scope},
        reference={"model": str(folder / "reference")},
        train={
            "learning_rate": LEARNING_RATE,
            "batch_size": BLOCKS * accumulation,
            "steps": STEPS,
            "schedule": "linear",
            "warmup_steps": 3,
            "gradient_accumulation": accumulation,
            "gradient_clipping": CLIPPING,
            "weight_decay": 0.1,
            "precision": "fp32",
            "deepspeed": str(ROOT / "ds_configs" / "zero0.json"),
        },
    )


def save_blocks(run: Path, folder: Path) -> None:
    """Write the blocks that a run reads, in its order, as a dataset whose columns are aligned with ``input_ids``."""
    from datasets import Dataset

    from dualtok.commands.train import open_streams
    from dualtok.config.load import load_run
    from dualtok.data.mixed import load_sources
    from dualtok.distributed.ranks import ALONE

    loaded = load_run(run)
    stream, _ = open_streams(loaded, load_sources(loaded.data, "train"), ("train", "validation"), ALONE)
    assert loaded.train is not None
    drawn = stream.batches(start_sample=0, global_micro_batch=BLOCKS, rank=0, world_size=1, workers=0)
    rows: dict[str, list[Any]] = {"input_ids": [], "position_ids": [], "labels": [], "reference_loss": []}
    for _ in range(STEPS * loaded.train.gradient_accumulation):
        batch = next(drawn)
        for name, filling in (("labels", -100), ("reference_loss", 0.0)):
            unshifted = batch[name].new_full(batch[name].shape, filling)
            unshifted[:, 1:] = batch[name][:, :-1]
            rows[name] += unshifted.tolist()
        for name in ("input_ids", "position_ids"):
            rows[name] += batch[name].tolist()
    Dataset.from_dict(rows).save_to_disk(str(folder))


def entry(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return a cell as the worker reads it."""
    return {
        "name": cell.name,
        "kind": cell.kind,
        "start": str(folder / "start"),
        "blocks": str(folder / f"blocks-{cell.accumulation}"),
        "dual": {"scope": cell.scope},
        "arguments": {
            "per_device_train_batch_size": BLOCKS // cell.ranks,
            "gradient_accumulation_steps": cell.accumulation,
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.1,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-8,
            "max_grad_norm": CLIPPING,
            "lr_scheduler_type": "linear",
            "warmup_steps": 3,
            **cell.arguments,
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train by ``dualtok train``, and return the folder with its runs and its blocks."""
    folder = tmp_path_factory.mktemp("trainer")
    corpus = write_small_corpus(folder / "corpus", characters=None)
    save_model(folder / "reference", seed=7, initializer_range=WIDE)
    save_model(folder / "start", seed=8, initializer_range=WIDE)
    runs = [own_run(folder, corpus, *each) for each in ((1, "micro_batch"), (4, "micro_batch"), (4, "step"))]
    succeed(dualtok("score", runs[0]))
    for accumulation, run in zip((1, 4), runs, strict=False):
        save_blocks(run, folder / f"blocks-{accumulation}")
    job = command("tests.multi_rank.train_cells", *runs)
    done = subprocess.run(job, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path) -> dict[str, str]:
    """Which launches were made already, and what they printed."""
    return {}


def trained(folder: Path, launched: dict[str, str], cell: Cell) -> list[dict[str, Any]]:
    """Return the log of a cell; the first one of a launch trains all of it."""
    if cell.launch not in launched:
        cells = [each for each in CELLS if each.launch == cell.launch]
        file = folder / f"{cell.launch}.json"
        file.write_text(json.dumps([entry(each, folder) for each in cells]))
        job = command("tests.integrations.transformers.train_cells", file, ranks=cell.ranks if cell.ranks > 1 else 0)
        done = subprocess.run(
            job,
            env=environment(LOCAL_SIZE=str(cell.ranks)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        launched[cell.launch] = done.stdout[-3000:] + done.stderr[-6000:]
    file = folder / f"{cell.name}.json"
    assert file.is_file(), launched[cell.launch]
    log: list[dict[str, Any]] = json.loads(file.read_text())
    return [line for line in log if "loss" in line]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_trainer_trains_as_dualtok_does(folder: Path, launched: dict[str, str], cell: Cell) -> None:
    own = folder / f"own-{cell.accumulation}-{cell.scope}"
    known = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    log = trained(folder, launched, cell)
    assert len(known) == len(log) == STEPS
    assert all(step["gradient_norm"] > CLIPPING for step in known), "clipping was not active"
    assert all(step["hard_tokens"] and step["memorized_tokens"] for step in known)
    names = {"loss": "loss"}
    if "zero0" not in cell.name:  # DeepSpeed clips there with torch, and forgets the norm
        names["gradient_norm"] = "grad_norm"
    if cell.kind == "trainer":
        names |= {"loss": "loss/dual", "hard_loss": "loss/hard", "memorized_loss": "loss/memorized"}
        names["plain_loss"] = "loss/plain"
        shares = [[step[f"{which}_tokens"] / step["tokens"] for which in ("hard", "memorized")] for step in known]
        assert [[line["share/hard"], line["share/memorized"]] for line in log] == shares
        np.testing.assert_allclose([line["loss"] for line in log], [line["loss/dual"] for line in log], rtol=1e-5)
    for own_name, name in names.items():
        rtol = cell.tolerance * (10 if own_name == "gradient_norm" else 1)
        np.testing.assert_allclose(
            [line[name] for line in log], [step[own_name] for step in known], rtol=rtol, err_msg=name
        )
    if not (target := folder / f"{own.name}.hf").exists():
        export(own, target, which="latest")
    weights = read_weights(folder / cell.name)
    weights.pop("lm_head.weight", None)  # DeepSpeed's copy of the tied embeddings
    assert relative_distance(read_weights(target), weights) < 10 * cell.tolerance
