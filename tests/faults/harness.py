"""Real training under torchrun that is hit by fault after fault, and what must be true afterwards."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dualtok.data.manifest import load_manifest
from dualtok.engine.checkpoint import find_checkpoint
from tests.faults.worker import FAULT, SAMPLES, Fault
from tests.support import ROOT, environment, measured, tiny_llama_config, write_run

RANKS, STEPS, EVERY = 2, 24, 3
NOTICE_SECONDS = 60
"""From a fault to the end of the whole job."""
DEADLINE_SECONDS = 600
"""For a job: a hang is a failure."""
KINDS = ("kill", "sigterm", "disk_full", "bad_shard", "notice")
"""``bad_shard`` is done to the files before a start, ``notice`` is SIGTERM to the launcher, as schedulers send it."""


@dataclass(frozen=True)
class Ended:
    """A finished job."""

    status: int
    output: str
    at: float
    """When it ended."""


@contextmanager
def small_disk(folder: Path, mebibytes: int = 48) -> Iterator[Path]:
    """Mount a file system of its own, so that a full disk is a full disk; needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def train(run: Path, samples: Path, *, fault: Fault | None = None, notice_after: float | None = None) -> Ended:
    """Run one job to its end: from the last checkpoint, or from the start."""
    samples.mkdir(exist_ok=True)
    variables = {SAMPLES: str(samples), "LOCAL_SIZE": str(RANKS)}
    if fault is not None:
        variables[FAULT] = fault.as_json()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m",
               "tests.faults.worker", "train", str(run), "--auto-resume"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(**variables), cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        if notice_after is not None:
            try:
                process.wait(notice_after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the job hangs: {process.communicate()[0][-4000:]}") from None
    return Ended(process.returncode, output, time.time())


@dataclass
class Campaign:
    """One run under faults.

    Args:
        folder: where everything is written; its sub-folder ``disk`` is the run's own disk.
        data: the run's section ``data``; it is copied, since faults damage it.
        seed: of the faults.
        faults: how many.
        kinds: to draw from.
    """

    folder: Path
    data: dict[str, Any]
    seed: int
    faults: int
    kinds: tuple[str, ...] = KINDS
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Write the run, and the undisturbed one to compare it with."""
        self.draw = random.Random(self.seed)
        self.disk = self.folder / "disk"
        own = self.folder / "data"
        shutil.copytree(self.data["dir"], own)
        settings: dict[str, Any] = {
            "seed": 5, "objective": "causal_lm", "model": {"config": tiny_llama_config()},
            "train": {"learning_rate": 5e-3, "batch_size": 8, "gradient_accumulation": 2, "steps": STEPS,
                      "precision": "fp32", "checkpoint_every": EVERY, "evaluate_every": 8, "evaluation_blocks": 8,
                      "checkpoint_in_background": self.seed % 2 == 1,
                      "deepspeed": str(ROOT / "ds_configs" / "zero3.json")},
            "monitor": {"log_every": 1},
        }  # fmt: skip
        self.run = write_run(self.folder / "hit.yaml", {**self.data, "dir": str(own)}, **settings)
        self.run.write_text(self.run.read_text().replace(str(self.run.with_suffix("")), str(self.disk / "run")))
        self.whole = write_run(self.folder / "whole.yaml", self.data, **settings)

    @property
    def output(self) -> Path:
        """The run's ``output_dir``."""
        return self.disk / "run"

    def carry_out(self) -> None:
        """Let every fault strike, finish the run, and compare."""
        whole = train(self.whole, self.folder / "samples-whole")
        assert whole.status == 0, whole.output[-4000:]
        with small_disk(self.disk):
            steps = sorted(self.draw.randint(1, STEPS) for _ in range(self.faults))
            for number, step in enumerate(steps):
                self._strike(number, self.draw.choice(self.kinds), step)
                self._no_checkpoint_is_torn()
            last = train(self.run, self.folder / "samples-hit")
            assert last.status == 0, last.output[-4000:]
            self._compare()

    def _strike(self, number: int, kind: str, step: int) -> None:
        samples, mark = self.folder / "samples-hit", self.folder / f"mark-{number}"
        if kind == "bad_shard":
            self._damage_a_shard(samples)
        elif kind == "notice":
            # Somewhere between the first import and the last step.
            ended = train(self.run, samples, notice_after=self.draw.uniform(1, 20))
            assert "Traceback (most recent call last)" not in ended.output.split("torch/distributed", maxsplit=1)[0]
        else:
            moment = "save" if kind == "disk_full" else self.draw.choice(("step", "save", "seal"))
            if moment != "step":
                step = max(EVERY, step // EVERY * EVERY)
            rank = 0 if moment == "seal" else self.draw.randrange(RANKS)
            fault = Fault(kind, rank, step, moment, str(mark), str(self.disk / "ballast"))  # type: ignore[arg-type]
            ended = train(self.run, samples, fault=fault)
            (self.disk / "ballast").unlink(missing_ok=True)
            if mark.exists():  # the step may lie before the last checkpoint
                self._judge(fault, ended, ended.at - float(mark.read_text()))
            else:
                assert ended.status == 0, ended.output[-4000:]
        self.log.append(f"fault {number}: {kind} at step {step}")

    def _judge(self, fault: Fault, ended: Ended, seconds: float) -> None:
        """Check how a job ended that was hit."""
        if fault.kind == "sigterm" and ended.status == 0:  # it came while the last step was being written
            assert fault.moment != "step" or fault.step == STEPS, ended.output[-4000:]
            return
        assert ended.status != 0, f"the job took no notice of {fault}"
        assert seconds < NOTICE_SECONDS, f"{seconds:.0f} s from {fault} to the end"
        if fault.kind == "kill":
            assert f"rank      : {fault.rank} " in ended.output, ended.output[-3000:]
            assert "SIGKILL" in ended.output
        elif fault.kind == "sigterm":
            assert f"asked to end after step {fault.step} of {STEPS}" in ended.output or fault.moment != "step", (
                ended.output[-3000:]
            )
            assert "exitcode  : 75" in ended.output
        elif fault.kind == "disk_full":
            assert "No space left on device" in ended.output, ended.output[-3000:]
            assert "dualtok: error:" in ended.output

    def _damage_a_shard(self, samples: Path) -> None:
        """Alter one byte, or take the file away: the job must name it. Then restore it."""
        folder = self.folder / "data"
        shard = folder / "train" / self.draw.choice(load_manifest(folder).splits["train"].shards).file
        kept = shard.read_bytes()
        if self.draw.random() < 0.5:
            shard.unlink()
        else:
            place = self.draw.randrange(len(kept))
            shard.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :])
        ended = train(self.run, samples)
        shard.write_bytes(kept)
        assert ended.status != 0
        assert f"{shard}: shard " in ended.output, ended.output[-3000:]

    def _no_checkpoint_is_torn(self) -> None:
        root = self.output / "checkpoints"
        if (root / "latest").is_file():
            pointed = (root / "latest").read_text().strip()
            assert find_checkpoint(root, pointed).folder.name == pointed

    def _compare(self) -> None:
        """The run is the undisturbed one: weights, measurements, and the blocks of every step."""
        undisturbed = self.whole.with_suffix("")
        readers = [find_checkpoint(folder / "checkpoints").reader() for folder in (self.output, undisturbed)]
        assert readers[0].parameters.keys() == readers[1].parameters.keys()
        for name in readers[0].parameters:
            assert torch.equal(readers[0].whole(name), readers[1].whole(name)), name
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            assert measured(self.output, file) == measured(undisturbed, file)
        blocks = [_blocks(self.folder / name) for name in ("samples-hit", "samples-whole")]
        assert len(blocks[1]) == STEPS
        assert blocks[0] == blocks[1], "a block was lost or repeated"


def _blocks(folder: Path) -> dict[int, list[list[int]]]:
    """Return the blocks that made each step what it is: those of the last time it was taken, on every rank."""
    steps: dict[int, list[list[int]]] = {}
    for file in sorted(folder.glob("rank-*.jsonl")):
        last = {row["step"]: row["rows"] for row in map(json.loads, file.read_text().splitlines())}
        for step, rows in last.items():
            steps.setdefault(step, []).append(rows)
    return steps
