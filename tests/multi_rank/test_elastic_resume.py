"""A run goes on in another layout, on another number of ranks, as if nothing had been changed."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support import (
    ROOT,
    command,
    deepspeed_json,
    dualtok,
    environment,
    history,
    partitioned_json,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

STEPS, FIRST, SECOND = 12, 4, 8
PIPELINE = {"engine": "pipeline", "pipeline": {"stages": 2}}
SHARDED = {"engine": "sharded_pipeline", "pipeline": {"stages": 2}}
# What runs up to step 4 on two ranks, up to step 8 on four, and to the end on one.
CHAINS = {
    "zero3-sharded-zero0": ({"zero": 3}, {"zero": 3, **SHARDED}, {"zero": 0}),
    "zero3-zero1-zero3": ({"zero": 3}, {"zero": 1}, {"zero": 3}),
    "pipeline-zero2-offload": ({"zero": 1, **PIPELINE}, {"zero": 2}, {"offload": True}),
    "offload-pipeline-zero1": ({"offload": True}, {"zero": 0, **PIPELINE}, {"zero": 1}),
    "adapter": ({"zero": 3}, {"zero": 1, **PIPELINE}, {"zero": 2}),
}
ADAPTER = "adapter"
"""The chain that trains a LoRA adapter, with its own base as a live reference."""


def launch(ranks: int, *segments: str) -> None:
    job = command("tests.multi_rank.train_segments", *segments, ranks=ranks)
    result = subprocess.run(
        job, env=environment(LOCAL_SIZE=str(ranks)), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    told = [line for line in result.stderr.splitlines() if line.startswith(("[rank", "dualtok"))]
    assert result.returncode == 0, "\n".join(told)


def set_layout(run: Path, layout: dict[str, Any], folder: Path) -> None:
    """Give a run another engine; all else stays."""
    tree = yaml.safe_load(run.read_text())
    for key in ("engine", "pipeline", "deepspeed"):
        tree["train"].pop(key, None)
    settings = dict(layout)
    stage = settings.pop("zero", None)
    if settings.pop("offload", False):
        tree["train"]["deepspeed"] = deepspeed_json("zero3_offload")
    elif stage == 3:
        tree["train"]["deepspeed"] = partitioned_json(folder)
    else:
        tree["train"]["deepspeed"] = deepspeed_json(f"zero{stage}")
    tree["train"].update(settings)
    run.write_text(yaml.safe_dump(tree, sort_keys=False))


def exported(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's last checkpoint, of a LoRA run its adapter's."""
    target = run.with_suffix(".hf")
    succeed(dualtok("export", run.with_suffix(""), target, "--checkpoint", "latest"))
    return read_weights(target)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_chain_of_layouts_trains_the_undisturbed_run(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    reference = save_model(tmp_path / "reference", seed=7, initializer_range=0.1)
    settings: dict[str, Any] = {
        "seed": 5,
        "objective": "dual",
        "model": {"config": tiny_llama_config(num_hidden_layers=3)},
        "reference": {"model": str(reference)},
        "train": {
            "learning_rate": 5e-3,
            "batch_size": 8,
            "gradient_accumulation": 2,
            "steps": STEPS,
            "precision": "fp32",
            "warmup_steps": 2,
            "gradient_clipping": 0.05,
            "checkpoint_every": 100,
            "checkpoint_in_background": True,
        },
    }
    adapted = {
        **settings,
        "model": {"path": str(reference), "lora": {"rank": 4, "alpha": 8}},
        "reference": {"mode": "adapter"},
    }
    kinds = {name: adapted if name == ADAPTER else settings for name in CHAINS}
    whole = write_run(tmp_path / "whole.yaml", small_corpus, **settings)
    succeed(dualtok("score", whole))
    whole_adapter = write_run(tmp_path / "whole_adapter.yaml", small_corpus, **adapted)
    for run in (whole, whole_adapter):
        succeed(dualtok("train", run))
    runs = {name: write_run(tmp_path / f"{name}.yaml", small_corpus, **kinds[name]) for name in CHAINS}
    for leg, (ranks, stop) in enumerate(((2, FIRST), (4, SECOND), (1, STEPS))):
        for name, run in runs.items():
            set_layout(run, CHAINS[name][leg], tmp_path)
        launch(ranks, *(f"{run}:{stop}" for run in runs.values()))
        for run in runs.values():
            assert history(run)[-1]["step"] == stop, "the run did not end where it was told to"
    expected = {run: exported(run) for run in (whole, whole_adapter)}
    for name, run in runs.items():
        undisturbed = whole_adapter if name == ADAPTER else whole
        for step, other in zip(history(run), history(undisturbed), strict=True):
            assert step["loss"] == pytest.approx(other["loss"], rel=1e-4), name
            assert step["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3), name
            assert step["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-9), name
            assert (step["hard_tokens"], step["memorized_tokens"]) == (other["hard_tokens"], other["memorized_tokens"])
        assert relative_distance(expected[undisturbed], exported(run)) < 1e-4, name
