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

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
DEVICES = torch.cuda.device_count() or 2
"""Ranks of a way that is spread over all devices; two on host cores."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to train the same small model on the same blocks."""

    train: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=lambda: {"mode": "resident"})
    ranks: int = 1
    on_host: bool = False
    """On host cores, also where there is a GPU."""
    interrupted: bool = False
    """Train the second half again from the checkpoint in the middle."""


def _zero(name: str, ranks: int = DEVICES) -> Way:
    return Way(train={"deepspeed": str(ROOT / "ds_configs" / f"{name}.json")}, ranks=ranks)


def _stages(engine: str) -> Way:
    train = {"engine": engine, "pipeline": {"stages": 2}}
    return Way(train=train, reference={"mode": "stored"}, ranks=2)


WAYS = {
    "host cores": Way(on_host=True),
    "device": Way(),
    "bf16": Way(train={"precision": "bf16"}),
    "stored scores": Way(reference={"mode": "stored"}),
    "reference offloaded": Way(reference={"mode": "offload"}),
    "reference on host cores": Way(reference={"mode": "cpu", "threads": 2}),
    "activation checkpointing": Way(),
    "ZeRO-3 on all devices": _zero("zero3"),
    "ZeRO-3, states on the host": _zero("zero3_offload"),
    "resumed halfway": Way(interrupted=True),
    "pipeline": _stages("pipeline"),
    "sharded pipeline": _stages("sharded_pipeline"),
}
"""Each is compared with the first one."""


def parity(folder: Path, chosen: list[str] | None = None) -> Figures:
    """Train in every way that the devices suffice for, some at once, and compare losses and memorised tokens.

    Args:
        folder: where blocks and weights are.
        chosen: names of :data:`WAYS`, or None for all; the first is always among them.
    """
    first, *_ = WAYS
    wanted = {name: way for name, way in WAYS.items() if chosen is None or name in (first, *chosen)}
    ways = {name: way for name, way in wanted.items() if way.ranks <= DEVICES}
    if any(way.reference["mode"] == "stored" for way in ways.values()):
        _dualtok("score", _run_file(folder, "stored scores"))
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, cores // 4)) as pool:
        rows = dict(zip(ways, pool.map(lambda name: _trained(folder, name), ways), strict=True))
    unlike = {}
    for name in ways:
        pairs = list(zip(rows[first], rows[name], strict=True))
        unlike[name] = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("plain_loss", "memorised_tokens")}
    return {"unlike": unlike, "ranks": {name: way.ranks for name, way in ways.items()},
            "left_out": [name for name in wanted if name not in ways], "steps": STEPS,
            "tokens": rows[first][0]["memorised_tokens"]}  # fmt: skip


def _trained(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what a way's run noted step by step."""
    way = WAYS[name]
    file = _run_file(folder, name)
    changes = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if way.on_host else {}
    _dualtok("train", file, ranks=way.ranks, **changes)
    output = file.with_suffix("")
    if way.interrupted:
        whole = _history(output)
        shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
        (output / "checkpoints" / "latest").write_text(f"step-{STEPS // 2:08d}\n")
        _dualtok("train", file, "--resume", ranks=way.ranks, **changes)
        assert len(_history(output)) == len(whole), "the resumed run did not go on from the middle"
    return _history(output)


def _history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _run_file(folder: Path, name: str) -> Path:
    way = WAYS[name]
    file = folder / "commands" / f"{name.replace(' ', '-').replace(',', '')}.yaml"
    model: dict[str, Any] = {"path": str(folder / "small-start")}
    if name == "activation checkpointing":
        model["activation_checkpointing"] = True
    reference = {"model": str(folder / "small-reference"), **way.reference}
    train = {"precision": "fp32", "checkpoint_every": STEPS // 2, "checkpoint_keep": 2, **way.train}
    return _write(file, folder, objective="dual", model=model, reference=reference, train=train)


def _write(file: Path, folder: Path, **sections: Any) -> Path:
    train = {"learning_rate": 1e-3, "batch_size": 8, "steps": STEPS, "evaluation_blocks": 8, **sections.pop("train")}
    run = {"data": {"dir": str(folder / "blocks-128"), "block_length": 128, "lanes": 16},
           "output_dir": str(file.with_suffix("")), "monitor": {"tensorboard": False}, "train": train,
           **sections}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(file.with_suffix(""), ignore_errors=True)
    file.write_text(yaml.safe_dump(run))
    return file


def _dualtok(verb: str, *arguments: Any, ranks: int = 1, **changes: str) -> str:
    """Run a command, with several ranks under torchrun, and return its output."""
    program = ["-m", "dualtok", verb, *map(str, arguments)]
    if ranks > 1 or verb == "train":
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    done = subprocess.run([sys.executable, *program], env=os.environ | changes, check=False, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"`dualtok {verb} {' '.join(map(str, arguments))}` ended with status {done.returncode}:\n"
                           f"{done.stdout[-4000:]}")  # fmt: skip
    return done.stdout


def dp_sgd(folder: Path) -> str:
    """Train with DP-SGD."""
    file = _write(folder / "commands" / "dp-sgd.yaml", folder, objective="causal_lm",
                  model={"path": str(folder / "small-start")}, privacy={"epsilon": 8.0, "delta": 1e-5},
                  train={"engine": "opacus", "precision": "fp32"})  # fmt: skip
    _dualtok("train", file)
    losses = [row["plain_loss"] for row in _history(file.with_suffix(""))]
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def lora(folder: Path) -> str:
    """Train adapters against their own base, in bf16, and export them."""
    model = {"path": str(folder / "small-start"), "lora": {"rank": 8}}
    file = _write(folder / "commands" / "lora.yaml", folder, objective="dual", reference={"mode": "adapter"},
                  model=model, train={"precision": "bf16"})  # fmt: skip
    _dualtok("train", file)
    _dualtok("export", file.with_suffix(""), file.with_suffix(".hf"), "--checkpoint", "latest")
    losses = [row["plain_loss"] for row in _history(file.with_suffix(""))]
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}, exported"


def audit(folder: Path) -> str:
    """Attack two models that have seen nothing, with all attacks that need no shadow models."""
    return _audited(folder, "audit", attacks=None)


def audit_zero3(folder: Path) -> str:
    """Attack models whose parameters lie sharded on all devices."""
    return _audited(folder, "audit-zero3", attacks=["loss", "ref", "min_k_plus_plus", "info_rmia"], ranks=DEVICES,
                    deepspeed=str(ROOT / "ds_configs" / "zero3.json"))  # fmt: skip


def _audited(folder: Path, name: str, *, attacks: list[str] | None, ranks: int = 1, **settings: Any) -> str:
    section = {"models": {"start": str(folder / "small-start")}, "attack_reference": str(folder / "small-reference"),
               **settings}  # fmt: skip
    if attacks is not None:
        section["attacks"] = attacks
    file = _write(folder / "commands" / f"{name}.yaml", folder, objective="causal_lm", audit=section, train={})
    _dualtok("audit", file, ranks=ranks)
    figures = json.loads((file.with_suffix("") / "audit" / "audit.json").read_text())
    [model] = figures["models"]
    return f"{len(model['attacks'])} attacks, perplexity {model['perplexity_non_members']:.0f}"


def doctor(folder: Path) -> str:
    """Examine the machine."""
    results = json.loads(subprocess.run(
        [sys.executable, "-m", "dualtok", "doctor", "--json"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout)  # fmt: skip
    bad = [f"{row['name']} ({row['status']}: {row['found']})" for row in results["checks"]
           if row["status"] in ("warn", "fail")]  # fmt: skip
    return f"{len(results['checks'])} checks" + ("; " + "; ".join(bad) if bad else "")


COMMANDS = {"dp_sgd": dp_sgd, "lora": lora, "audit": audit, "audit_zero3": audit_zero3, "doctor": doctor}


def command(name: str, folder: Path) -> Figures:
    """Run one of :data:`COMMANDS` and return its seconds and what came of it."""
    started = time.perf_counter()
    found = COMMANDS[name](folder)
    return {"seconds": time.perf_counter() - started, "found": found}
