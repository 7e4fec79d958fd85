"""The real commands on a machine: every way of training gives the same losses there, and the other verbs work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from dualtok.launch.local import rank_environment, torchrun

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
ON_GPU = torch.cuda.is_available()
"""Whether all ways but those on host cores run on a GPU."""
DEVICES = torch.cuda.device_count() or 2
"""Ranks of a way that is spread over all devices; two on host cores."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to train the same small model on the same blocks."""

    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=lambda: {"mode": "resident"})
    ranks: int = 1
    on_host: bool = False
    """On host cores, also where there is a GPU."""
    interrupted: bool = False
    """Train the second half again from the checkpoint in the middle."""
    tolerance: float = 1e-5
    """Largest difference of a loss in nats that is no fault; of the gradient's norm, relative to it, this or on a GPU
    :data:`NORM_TOLERANCE`, whichever is larger."""


def _zero(name: str) -> Way:
    return Way(train={"deepspeed": str(ROOT / "ds_configs" / f"{name}.json")}, ranks=DEVICES)


def _stages(engine: str) -> Way:
    return Way(train={"engine": engine, "pipeline": {"stages": 2}}, reference={"mode": "stored"}, ranks=2)


WAYS = {
    "host cores": Way(on_host=True),
    "device": Way(),
    "bf16": Way(train={"precision": "bf16"}, tolerance=0.03),
    "stored scores": Way(reference={"mode": "stored"}),
    "reference offloaded": Way(reference={"mode": "offload"}),
    "reference on host cores": Way(reference={"mode": "cpu", "threads": 2}),
    "activation checkpointing": Way(model={"activation_checkpointing": True}),
    "ZeRO-3 on all devices": _zero("zero3"),
    "ZeRO-3, states on the host": _zero("zero3_offload"),
    "resumed halfway": Way(interrupted=True),
    "pipeline": _stages("pipeline"),
    "sharded pipeline": _stages("sharded_pipeline"),
}
"""Each is compared with the first one."""

NORM_TOLERANCE = 2e-4
"""For norms that another device has added up: on host cores torch's of 4 million float32 elements is off by 7e-5."""

LOSSES = ("plain_loss", "hard_loss", "memorized_loss")
"""Of all tokens, and of those that are learned and unlearned, so that another choice of tokens shows."""


def parity(folder: Path, chosen: list[str] | None = None) -> Figures:
    """Train in every way that the devices suffice for, some at once, and compare losses and norms of gradients.

    Args:
        folder: where blocks and weights are.
        chosen: names of :data:`WAYS`, or None for all; the first is always among them.
    """
    first, *_ = WAYS
    wanted = {name: way for name, way in WAYS.items() if chosen is None or name in (first, *chosen)}
    ways = {name: way for name, way in wanted.items() if way.ranks <= DEVICES}
    if any(way.reference["mode"] == "stored" for way in ways.values()):
        _dualtok("score", _run_file(folder, "stored scores"))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        trained = {name: pool.submit(_trained, folder, name) for name in ways}
    rows = {name: run.result() for name, run in trained.items() if run.exception() is None}
    if first not in rows:
        raise RuntimeError(f"{first}: {trained[first].exception()}")
    return {
        "unlike": {name: _unlike(rows[first], history) for name, history in rows.items()},
        "failed": {name: str(run.exception()) for name, run in trained.items() if run.exception() is not None},
        "left_out": [name for name in wanted if name not in ways],
        "steps": STEPS,
    }


def _unlike(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest differences of two runs over their steps."""
    pairs = list(zip(rows, others, strict=True))
    return {
        "loss": max(abs(a[key] - b[key]) for a, b in pairs for key in LOSSES),
        "gradient_norm": max(abs(a["gradient_norm"] - b["gradient_norm"]) / a["gradient_norm"] for a, b in pairs),
    }


def too_far(name: str, unlike: dict[str, float]) -> bool:
    """Return whether a way's differences are more than another order of the same sums explains."""
    return not all(unlike[what] <= allowed for what, allowed in allowed_of(name).items())  # a NaN is too far as well


def allowed_of(name: str, *, on_gpu: bool = ON_GPU) -> dict[str, float]:
    """Return how far a way's losses and norms of gradients may be from those on host cores."""
    tolerance = WAYS[name].tolerance
    return {"loss": tolerance, "gradient_norm": max(tolerance, NORM_TOLERANCE) if on_gpu else tolerance}


def _trained(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what a way's run noted step by step."""
    way = WAYS[name]
    file = _run_file(folder, name)
    changes = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if way.on_host else {}
    _dualtok("train", file, ranks=way.ranks, **changes)
    output = file.with_suffix("")
    if not way.interrupted:
        return _history(output)
    whole = _history(output)
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    (output / "checkpoints" / "latest").write_text(f"step-{STEPS // 2:08d}\n")
    _dualtok("train", file, "--resume", ranks=way.ranks, **changes)
    resumed = _history(output)
    again = [
        row != before for row, before in zip(resumed, whole, strict=True)
    ]  # the clock alone makes a new row another
    if again != [step >= STEPS // 2 for step in range(STEPS)]:
        raise RuntimeError("the resumed run did not train the second half again, and that alone")
    return resumed


def _history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _run_file(folder: Path, name: str) -> Path:
    way = WAYS[name]
    file = folder / "commands" / f"{name.replace(' ', '-').replace(',', '')}.yaml"
    reference = {"model": str(folder / "small-reference"), **way.reference}
    train = {"precision": "fp32", "checkpoint_every": STEPS // 2, "checkpoint_keep": 2, **way.train}
    model = {"path": str(folder / "small-start"), **way.model}
    return _write(file, folder, objective="dual", model=model, reference=reference, train=train)


def _write(file: Path, folder: Path, **sections: Any) -> Path:
    train = {"learning_rate": 1e-3, "batch_size": 8, "steps": STEPS, "evaluation_blocks": 8, **sections.pop("train")}
    run = {
        "data": {"dir": str(folder / "blocks-128"), "block_length": 128, "lanes": 16},
        "output_dir": str(file.with_suffix("")),
        "monitor": {"tensorboard": False},
        "train": train,
        **sections,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(file.with_suffix(""), ignore_errors=True)
    file.write_text(yaml.safe_dump(run))
    return file


def _dualtok(verb: str, *arguments: Any, ranks: int = 1, **changes: str) -> None:
    """Run a command under torchrun.

    Raises:
        RuntimeError: it failed; says of what.
    """
    told = [verb, *map(str, arguments)]
    done = subprocess.run(
        torchrun(["--standalone"], ranks, "dualtok", told),
        env=rank_environment(ranks) | changes,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        errors = [line for line in done.stdout.splitlines() if "Error: " in line or line.startswith("dualtok: error:")]
        raise RuntimeError(f"`dualtok {' '.join(told)}`: {errors[-1] if errors else f'status {done.returncode}'}")


def dp_sgd(folder: Path) -> str:
    """Train with DP-SGD."""
    file = _write(
        folder / "commands" / "dp-sgd.yaml",
        folder,
        objective="causal_lm",
        model={"path": str(folder / "small-start")},
        privacy={"epsilon": 8.0, "delta": 1e-5},
        train={"engine": "opacus", "precision": "fp32"},
    )
    _dualtok("train", file)
    losses = [row["plain_loss"] for row in _history(file.with_suffix(""))]
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def lora(folder: Path) -> str:
    """Train adapters against their own base, in bf16, and export them."""
    model = {"path": str(folder / "small-start"), "lora": {"rank": 8}}
    file = _write(
        folder / "commands" / "lora.yaml",
        folder,
        objective="dual",
        reference={"mode": "adapter"},
        model=model,
        train={"precision": "bf16"},
    )
    _dualtok("train", file)
    _dualtok("export", file.with_suffix(""), file.with_suffix(".hf"), "--checkpoint", "latest")
    losses = [row["plain_loss"] for row in _history(file.with_suffix(""))]
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}, exported"


def audit(folder: Path) -> str:
    """Attack a model that has seen nothing, with the attacks that are run by default."""
    return _audited(folder, "audit", attacks=None)


def audit_zero3(folder: Path) -> str:
    """Attack a model whose parameters lie sharded on all devices."""
    return _audited(
        folder,
        "audit-zero3",
        attacks=["loss", "ref", "min_k_plus_plus", "info_rmia"],
        ranks=DEVICES,
        deepspeed=str(ROOT / "ds_configs" / "zero3.json"),
    )


def _audited(folder: Path, name: str, *, attacks: list[str] | None, ranks: int = 1, **settings: Any) -> str:
    section = {
        "models": {"start": str(folder / "small-start")},
        "attack_reference": str(folder / "small-reference"),
        **settings,
    }
    if attacks is not None:
        section["attacks"] = attacks
    file = _write(folder / "commands" / f"{name}.yaml", folder, objective="causal_lm", audit=section, train={})
    _dualtok("audit", file, ranks=ranks)
    figures = json.loads((file.with_suffix("") / "audit" / "audit.json").read_text())
    [model] = figures["models"]
    return f"{len(model['attacks'])} attacks, perplexity {model['perplexity_non_members']:.0f}"


def doctor(folder: Path) -> str:
    """Examine the machine."""
    results = json.loads(
        subprocess.run(
            [sys.executable, "-m", "dualtok", "doctor", "--json"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    )
    failed = [f"{row['name']}: {row['found']}" for row in results["checks"] if row["status"] == "fail"]
    if failed:
        raise RuntimeError("; ".join(failed))
    warned = [f"{row['name']} ({row['found']})" for row in results["checks"] if row["status"] == "warn"]
    return f"{len(results['checks'])} checks" + ("; warned of " + "; ".join(warned) if warned else "")


COMMANDS = {"dp_sgd": dp_sgd, "lora": lora, "audit": audit, "audit_zero3": audit_zero3, "doctor": doctor}


def command(name: str, folder: Path) -> Figures:
    """Run one of :data:`COMMANDS` and return its seconds and what came of it."""
    started = time.perf_counter()
    found = COMMANDS[name](folder)
    return {"seconds": time.perf_counter() - started, "found": found}
