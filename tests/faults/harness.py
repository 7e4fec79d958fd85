"""Real training under torchrun that is hit by fault after fault, and what must be true afterwards."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dualtok.data.manifest import load_manifest
from dualtok.train.checkpoints.writer import find_checkpoint
from tests.data.remote.servers import CREDENTIALS, fault_server, s3_server, upload
from tests.faults.worker import FAULT, SAMPLES, Fault
from tests.support import ROOT, command, environment, kill_job, measured, tiny_llama_config, write_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RANKS, STEPS, EVERY = 2, 24, 3
NOTICE_SECONDS = 60
"""From a fault to the end of the whole job."""
DEADLINE_SECONDS = 600
"""For a job: a hang is a failure."""
KINDS = ("kill", "sigterm", "disk_full", "bad_shard", "notice", "remote")
"""``bad_shard`` is done to the files before a start, ``notice`` is SIGTERM to the launcher, as schedulers send it,
``remote`` is the object store at fault: a campaign that may draw it trains from S3, through a proxy that spoils."""
PASSING = ("500", "truncated", "short", "flipped", "slow", "dropped", "gone")


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
    variables = {SAMPLES: str(samples), "LOCAL_SIZE": str(RANKS), **CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}
    if fault is not None:
        variables[FAULT] = fault.as_json()
    job = command("tests.faults.worker", "train", run, "--auto-resume", ranks=RANKS)
    process = subprocess.Popen(
        job, env=environment(**variables), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        if notice_after is not None:
            try:
                process.wait(notice_after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_job(process)
        raise AssertionError(f"the job hangs: {process.communicate(timeout=60)[0][-4000:]}") from None
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
        self.own = self.folder / "data"
        shutil.copytree(self.data["dir"], self.own)
        settings: dict[str, Any] = {
            "seed": 5,
            "objective": "causal_lm",
            "model": {"config": tiny_llama_config()},
            "train": {
                "learning_rate": 5e-3,
                "batch_size": 8,
                "gradient_accumulation": 2,
                "steps": STEPS,
                "precision": "fp32",
                "checkpoint_every": EVERY,
                "evaluate_every": 8,
                "evaluation_blocks": 8,
                "checkpoint_in_background": self.seed % 2 == 1,
                "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
            },
            "monitor": {"log_every": 1},
        }
        self.settings = settings
        self.run = self.folder / "hit.yaml"
        self.whole = write_run(self.folder / "whole.yaml", self.data, **settings)

    def _write_run(self, data: dict[str, Any]) -> None:
        write_run(self.run, {**self.data, **data}, **self.settings)
        self.run.write_text(self.run.read_text().replace(str(self.run.with_suffix("")), str(self.disk / "run")))

    @property
    def output(self) -> Path:
        """The run's ``output_dir``."""
        return self.disk / "run"

    def carry_out(self) -> None:
        """Let every fault strike, finish the run, and compare."""
        whole = train(self.whole, self.folder / "samples-whole")
        assert whole.status == 0, whole.output[-4000:]
        with ExitStack() as stack:
            stack.enter_context(small_disk(self.disk))
            self._write_run({"dir": str(self.own)})
            if "remote" in self.kinds:
                self._serve(stack)
            steps = sorted(self.draw.randint(1, STEPS) for _ in range(self.faults))
            for number, step in enumerate(steps):
                self._strike(number, self.draw.choice(self.kinds), step)
                self._no_checkpoint_is_torn()
            last = train(self.run, self.folder / "samples-hit")
            assert last.status == 0, last.output[-4000:]
            self._compare()

    def _serve(self, stack: ExitStack) -> None:
        """Let the run read its data from S3, through a proxy that spoils what it is told to."""
        server = stack.enter_context(s3_server())
        self.proxy = stack.enter_context(fault_server(server))
        self.cache = self.folder / "cache"
        stream = {"endpoint_url": self.proxy.url, "cache_dir": str(self.cache), "retry_seconds": 30, "attempts": 5}
        self._write_run({"dir": upload(self.own, server, "data"), "stream": stream})

    def _strike(self, number: int, kind: str, step: int) -> None:
        samples, mark, drawn = self.folder / "samples-hit", self.folder / f"mark-{number}", kind
        moment = "save" if kind == "disk_full" else self.draw.choice(("step", "save", "finalize"))
        if kind == "remote":
            shutil.rmtree(self.cache, ignore_errors=True)  # else nothing would be fetched
            if self.draw.random() < 0.5:
                kind = "bad_shard"
            else:  # the retries must hide these; a kill ends the job, so that more can follow
                for shard in self.draw.sample(self._shards(), 3):
                    self.proxy.spoil(f"train/{shard.name}", self.draw.choice(PASSING), self.draw.randint(1, 3))
                kind, moment = "kill", "step"
        if kind == "bad_shard":
            struck = self._damage_a_shard(samples)
        elif kind == "notice":
            # Somewhere between the first import and the last step.
            ended = train(self.run, samples, notice_after=self.draw.uniform(1, 20))
            assert "Traceback (most recent call last)" not in ended.output.split("torch/distributed", maxsplit=1)[0]
            struck = ended.status != 0
        else:
            if moment != "step":
                step = max(EVERY, step // EVERY * EVERY)
            rank = 0 if moment == "finalize" else self.draw.randrange(RANKS)
            fault = Fault(kind, rank, step, moment, str(mark), str(self.disk / "ballast"))  # type: ignore[arg-type]
            ended = train(self.run, samples, fault=fault)
            (self.disk / "ballast").unlink(missing_ok=True)
            struck = mark.exists()  # the step may lie before the last checkpoint
            if struck:
                self._judge(fault, ended, ended.at - float(mark.read_text()))
            else:
                assert ended.status == 0, ended.output[-4000:]
        if struck:
            self.log.append(f"fault {number}: {drawn} at step {step}")

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

    def _shards(self) -> list[Path]:
        return [self.own / "train" / shard.file for shard in load_manifest(self.own).splits["train"].shards]

    def _damage_a_shard(self, samples: Path) -> bool:
        """Spoil a shard: the job must name it, if it reads it at all. Then restore it."""
        shard = self.draw.choice(self._shards())
        if "remote" in self.kinds:
            shutil.rmtree(self.cache, ignore_errors=True)
            self.proxy.spoil(f"train/{shard.name}", self.draw.choice(("gone", "500", "flipped", "truncated")))
            ended = train(self.run, samples)
            self.proxy.heal()
            named = f"train/{shard.name}: given up after 5 attempts"
        else:
            ended = self._train_with_damaged(shard, samples)
            named = f"{shard}: shard "
        assert ended.status == 0 or named in ended.output, ended.output[-3000:]
        return ended.status != 0

    def _train_with_damaged(self, shard: Path, samples: Path) -> Ended:
        """Alter one byte, or take the file away, for as long as the job takes."""
        kept = shard.read_bytes()
        if self.draw.random() < 0.5:
            shard.unlink()
        else:
            place = self.draw.randrange(len(kept))
            shard.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :])
        ended = train(self.run, samples)
        shard.write_bytes(kept)
        return ended

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
