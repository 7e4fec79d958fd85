"""``dualtok status``: how a training run stands, from the files in its folder alone."""

from __future__ import annotations

import json as json_module
import math
import socket
import statistics
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dualtok.config.load import load_run
from dualtok.distributed.job_record import read_ends, read_started
from dualtok.errors import CheckpointError, ConfigError
from dualtok.train.checkpoints.manifest import BEST, COMPLETE, read_manifest, step_of, tag_of
from dualtok.train.folder import CHECKPOINTS, RUN_FILE
from dualtok.train.history import StepMetrics, read_history

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.distributed.job_record import RankEnd, Started

State = Literal["running", "silent", "finished", "preempted", "stopped", "hung", "crashed", "killed", "unknown"]
RECENT = 20
"""Steps that speed and time left are judged by."""
PATIENCE, SILENCE_SECONDS = 10, 600.0
"""Steps' time, and least seconds, without a sign after which a job on another host counts as silent."""
LONELY = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "Socket")
"""What a rank says when another one has gone."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder says."""

    folder: str
    state: State
    """``running`` on this host, or by the age of its files; ``silent``: on another host, without a sign for long;
    ``stopped``: by an error that names the next step; ``crashed``: by one that does not; ``killed``: without a word;
    ``unknown``: it was never started, or by a version that left no record."""
    reason: str
    """Why it ended; who works on it."""
    next_command: str
    step: int
    total_steps: int | None
    seconds_since_sign: float | None
    """Since the last line of ``metrics.jsonl``, or since the start."""
    seconds_per_step: float | None
    """Median of the last steps."""
    last_step: dict[str, Any] = field(default_factory=dict)
    """The last line of ``metrics.jsonl``."""
    last_evaluation: dict[str, Any] = field(default_factory=dict)
    steps_left_out: int = 0
    """Steps that were not finite, or spikes, and changed nothing."""
    skipped_blocks: int = 0
    """Blocks that were empty because their shard is bad."""
    checkpoint: str | None = None
    """The last complete one; its sizes and checksums are not looked at."""
    checkpoint_step: int | None = None
    best_checkpoint: str | None = None
    torn_checkpoints: tuple[str, ...] = ()
    """Those that were being written when the run ended, or are now."""
    events: int = 0
    """TensorBoard event files."""
    stacks: tuple[str, ...] = ()
    """Stacks that the watchdog wrote in the last job."""


def read_status(path: Path) -> RunStatus:
    """Return how a run stands.

    Args:
        path: a run's ``output_dir``, or its YAML file.

    Raises:
        ConfigError: there is no run at ``path``.
    """
    folder = Path(load_run(path).output_dir) if path.is_file() else path
    started = read_started(folder)
    metrics = read_history(folder / "metrics.jsonl")
    if started is None and not (folder / RUN_FILE).is_file() and not metrics:
        raise ConfigError(f"{folder}: holds no training run (no {RUN_FILE}); give a run's output_dir or its YAML file")
    evaluations = read_history(folder / "evaluations.jsonl")
    complete, torn = _checkpoints(folder / CHECKPOINTS)
    per_step = _seconds_per_step(metrics)
    sign = _last_sign(folder, started)
    since = None if sign is None else max(0.0, time.time() - sign)
    total = _total_steps(folder, started, complete)
    state, reason = _state(folder, started, since, per_step, total)
    best = folder / CHECKPOINTS / BEST
    return RunStatus(
        folder=str(folder),
        state=state,
        reason=reason,
        next_command=_next_command(folder, state, started, has_checkpoint=complete is not None),
        step=metrics[-1]["step"] if metrics else 0,
        total_steps=total,
        seconds_since_sign=since,
        seconds_per_step=per_step,
        last_step=metrics[-1] if metrics else {},
        last_evaluation=evaluations[-1] if evaluations else {},
        steps_left_out=sum(bool(row.get("left_out")) for row in metrics),
        skipped_blocks=sum(row.get("skipped_blocks", 0) for row in metrics),
        checkpoint=None if complete is None else complete.name,
        checkpoint_step=None if complete is None else step_of(complete.name),
        best_checkpoint=best.read_text(encoding="utf-8").strip() if best.is_file() else None,
        torn_checkpoints=tuple(torn),
        events=len(list((folder / "events").glob("*tfevents*"))),
        stacks=tuple(
            str(file)
            for file in sorted((folder / "stacks").glob("rank-*.txt"))
            if started is None or file.stat().st_mtime >= started.time
        ),
    )


def _checkpoints(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint, and the names of those that are not complete."""
    folders = sorted(root.glob("step-*"))
    complete = [folder for folder in folders if (folder / COMPLETE).is_file()]
    return (complete[-1] if complete else None), [folder.name for folder in folders if folder not in complete]


def _seconds_per_step(metrics: Sequence[dict[str, Any]]) -> float | None:
    recent = [row["tokens"] / row["tokens_per_second"] for row in metrics[-RECENT:] if row.get("tokens_per_second")]
    return statistics.median(recent) if recent else None


def _last_sign(folder: Path, started: Started | None) -> float | None:
    """Return when the run last wrote something about its progress."""
    times = [
        file.stat().st_mtime for file in (folder / "metrics.jsonl", folder / "evaluations.jsonl") if file.is_file()
    ]
    times += [] if started is None else [started.time]
    return max(times, default=None)


def _total_steps(folder: Path, started: Started | None, complete: Path | None) -> int | None:
    """Return the steps of the whole run, from whatever says so."""
    if started is not None:
        return started.total_steps
    try:
        stored = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8")) if complete is None else None
        run = stored if complete is None else read_manifest(complete).run
    except (CheckpointError, OSError, ValueError, yaml.YAMLError):
        return None
    steps = ((run or {}).get("train") or {}).get("steps")
    return None if steps is None else int(steps)


def _state(
    folder: Path, started: Started | None, since: float | None, per_step: float | None, total: int | None
) -> tuple[State, str]:
    """Judge by what the ranks said at their end, else by rank 0's process, else by the age of the files."""
    if total is not None and (folder / CHECKPOINTS / tag_of(total) / COMPLETE).is_file():
        return "finished", f"all {total} steps are done and saved"
    if started is None:
        return "unknown", "the run left no record of a job: it died before its first step, or is of an earlier version"
    ends = read_ends(folder)
    if ends:
        return _ended(started, ends)
    alive, ranks = started.is_alive(), _ranks(started.world_size)
    if alive is None:
        return _elsewhere(started, since or 0.0, per_step or 0.0)
    if alive:
        return "running", f"rank 0 is process {started.pid} on this host, of {ranks}"
    return "killed", (
        f"rank 0 (process {started.pid} of {ranks}) is gone and said nothing: killed, out of memory (`dmesg`), or the "
        "host went down; the launcher's output may know more"
    )


def _elsewhere(started: Started, since: float, per_step: float) -> tuple[State, str]:
    """Judge a job on another host by the age of its last sign."""
    where = f"rank 0 is process {started.pid} on {started.host}, which {socket.gethostname()} cannot see"
    if since < max(SILENCE_SECONDS, PATIENCE * per_step):
        return "running", f"{where}; its last sign is {_duration(since)} old"
    return "silent", f"{where}; no sign for {_duration(since)}: look there, or at the scheduler"


def _ended(started: Started, ends: Sequence[RankEnd]) -> tuple[State, str]:
    """Judge by what the ranks said. Who only lost the others' connection is less to blame than who says nothing."""
    own = [end for end in ends if not any(word in end.message for word in LONELY)]
    first = (own or ends)[0]
    words = f"rank {first.rank}: {first.message}" if first.message else f"rank {first.rank} ended"
    silent = sorted(set(range(started.world_size)) - {end.rank for end in ends})
    quiet = ", ".join(map(str, silent[:8])) + (" ..." if len(silent) > 8 else "")
    if not own:
        if silent:
            return "killed", (
                f"rank {quiet} ended without a word: killed, out of memory (`dmesg`), or its host went down; {words}"
            )
        return "crashed", words
    if first.outcome == "hung":
        stuck = "; ".join(f"rank {end.rank}: {end.message}" for end in own[:4] if end.outcome == "hung")
        return "hung", stuck + ("; the rank that waits in no collective is the one to look at")
    states: dict[str, State] = {
        "finished": "finished",
        "preempted": "preempted",
        "error": "stopped",
        "bug": "crashed",
        "lost_host": "stopped",
    }
    return states[first.outcome], words


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _objective(folder: Path) -> str:
    file = folder / RUN_FILE
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return str(settings.get("objective", ""))


def _next_command(folder: Path, state: State, started: Started | None, *, has_checkpoint: bool) -> str:
    """Return what to run now."""
    if state == "running":
        return f"tensorboard --logdir {folder / 'events'}"
    if state == "finished" and _objective(folder) == "dual_plus":
        return f"dualtok interpolate {folder / RUN_FILE} {folder / 'model'}"
    if state == "finished":
        return f"dualtok export {folder} {folder / 'model'}"
    ranks = 1 if started is None else started.world_size
    start = "dualtok" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m dualtok"
    resume = " --resume" if has_checkpoint else ""
    note = "" if ranks == 1 else "    # or the launcher that started it; any number of ranks that the batch allows"
    return f"{start} train {folder / RUN_FILE}{resume}{note}"


def print_status(path: Path, *, json: bool) -> None:
    """Print how a run stands, as text or as JSON."""
    status = read_status(path)
    print(json_module.dumps(asdict(status), indent=1) if json else describe(status))


def describe(status: RunStatus) -> str:
    """Return a status as lines ``name  value``."""
    of = "" if status.total_steps is None else f" of {status.total_steps:,} ({status.step / status.total_steps:.0%})"
    lines = {"run": status.folder, "state": f"{status.state}: {status.reason}", "step": f"{status.step:,}{of}"}
    if status.seconds_since_sign is not None:
        lines["last sign"] = f"{_duration(status.seconds_since_sign)} ago"
    if status.seconds_per_step:
        speed = f"{status.seconds_per_step:.3g} s per step, {status.last_step['tokens_per_second']:,.0f} tokens/s"
        if status.total_steps is not None and status.state == "running":
            left = (status.total_steps - status.step) * status.seconds_per_step
            ends = datetime.fromtimestamp(time.time() + left, UTC).astimezone()
            speed += f", {_duration(left)} left (until {ends:%Y-%m-%d %H:%M})"
        lines["speed"] = speed
    if status.last_step:
        lines["losses"] = _figures(
            {
                "objective": status.last_step.get("loss"),
                **{name: status.last_step.get(f"{name}_loss") for name in ("hard", "memorized", "plain")},
            }
        )
        known = {"step", "left_out", *StepMetrics.__dataclass_fields__}
        rest = {key: value for key, value in status.last_step.items() if key not in known}
        lines["optimizer"] = _figures({name: status.last_step.get(name) for name in ("learning_rate", "gradient_norm")})
        lines["memory"] = f"{status.last_step.get('peak_memory_gib', math.nan):.2f} GiB at most on rank 0"
        if rest:
            lines["further"] = _figures(rest)
    if status.last_evaluation:
        lines["evaluation"] = _figures(status.last_evaluation)
    if status.steps_left_out or status.skipped_blocks:
        lines["left out"] = f"{status.steps_left_out} bad steps, {status.skipped_blocks} blocks of bad shards"
    lines["checkpoint"] = "none is complete"
    if status.checkpoint is not None:
        best = "" if status.best_checkpoint is None else f"; best {status.best_checkpoint}"
        lost = f"; {status.step - (status.checkpoint_step or 0)} steps since then" if status.state != "finished" else ""
        lines["checkpoint"] = f"{status.checkpoint}{lost}{best}"
    if status.torn_checkpoints:
        being = "being written" if status.state == "running" else "unfinished, to be removed by the next job"
        lines["checkpoint"] += f"; {', '.join(status.torn_checkpoints)}: {being}"
    if status.events:
        lines["events"] = f"{status.events} files in {status.folder}/events"
    if status.stacks:
        lines["stacks"] = ", ".join(status.stacks[:8])
    lines["next"] = status.next_command
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def _figures(values: dict[str, Any]) -> str:
    """Return named numbers in short; those that are missing or not a number are left out."""
    shown = []
    for name, value in values.items():
        if isinstance(value, bool | str) or value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        shown.append(f"{name} {text}")
    return ", ".join(shown)


def _duration(seconds: float) -> str:
    """Return seconds in the two largest units that they have."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
