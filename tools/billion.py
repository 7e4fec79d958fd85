"""A model of 1.1 billion parameters on a small machine: dual-loss steps with a reference of the same size.

ZeRO-3 keeps weights and gradients in host memory and the optimizer's states in files (``--states nvme``): 16 bytes per
parameter, read and written once per step through DeepSpeed's asynchronous I/O (Debian: libaio-dev). The reference is a
second, forward-only ZeRO-3 engine in host memory (``reference.mode: offload``). All weights are random and written
piece by piece. Printed: losses, memory per rank, and what ``dualtok.plan.memory`` predicts.

    python -m torch.distributed.run --standalone --nproc-per-node=2 tools/billion.py [--size 1.1b] [--steps 2]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benchmark_support import prepared_corpus
from rank_support import resident
from transformers import AutoConfig, PretrainedConfig

from dualtok.commands.train import open_streams
from dualtok.config.model import ModelConfig
from dualtok.config.reference import ReferenceConfig
from dualtok.config.run import RunConfig
from dualtok.config.train import TrainConfig
from dualtok.data.mixed import load_sources
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import Ranks, join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights
from dualtok.objective.loss import build_objective
from dualtok.plan.memory import Job, estimate_memory
from dualtok.plan.shape import read_shape
from dualtok.train.engines.build import build_engine
from dualtok.train.live_reference import build_reference
from dualtok.train.loop import TrainingLoop

if TYPE_CHECKING:
    from dualtok.config.data import DataConfig

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.1b": {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12, "num_attention_heads": 10},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
KEY_VALUE_HEADS = {"tiny": 2, "0.1b": 2, "1.1b": 4}
VOCABULARY, BLOCK_LENGTH, BLOCKS = 32_000, 128, 2
SUB_GROUP = 20_000_000
"""Elements that the optimizer works on at once; the embeddings are one sub-group, however large."""
LOSS_MIB = 64
LEAST_FREE = 2**30
"""Bytes of free memory below which the job ends itself, before it troubles others."""


def main() -> None:
    """Train some steps and print losses and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--states", choices=("nvme", "cpu"), default="nvme", help="where the optimizer's states lie")
    parser.add_argument("--folder", type=Path, default=Path("runs/billion"), help="weights, data and states")
    options = parser.parse_args()
    return_freed_memory()
    threading.Thread(target=watch_memory, daemon=True).start()
    ranks = join_ranks()
    if ranks.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        multiply_in_float32()
    folder = options.folder / options.size
    data = ranks.first_does(lambda: prepare(options.folder, folder, llama(options.size)))
    zero = write_deepspeed(folder / f"deepspeed-{ranks.rank}.json", folder / "states", options.states)
    base = restart_peak()
    run = RunConfig(
        data=data,
        objective="dual",
        output_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder / "start"), activation_checkpointing=True),
        train=TrainConfig(
            learning_rate=1e-4,
            batch_size=BLOCKS,
            steps=options.steps,
            deepspeed=zero,
            precision="bf16",
            schedule="constant",
            loss_memory_mib=LOSS_MIB,
        ),
        reference=ReferenceConfig(
            model=str(folder / "reference"), mode="offload", precision="bf16", batch_size=1, deepspeed=zero
        ),
    )
    peaks = {"libraries": base}
    loop = build_loop(run, ranks, peaks)
    batches = loop.batches()
    for step in range(options.steps):
        started = time.perf_counter()
        outcome = loop.step(batches)
        log(
            ranks,
            f"step {outcome.step}: loss {outcome.loss:.4f}, hard {outcome.hard_loss:.4f}, memorized "
            f"{outcome.memorized_loss}, gradient norm {outcome.gradient_norm:.3f}, "
            f"{time.perf_counter() - started:.0f} s, {resident('VmRSS') / 2**30:.2f} GiB now",
        )
        peaks[f"step {step + 1}"] = restart_peak()
    report(ranks, ranks.gather_objects((peaks, proportional())), options)
    shutil.rmtree(folder / "states", ignore_errors=True)
    leave_ranks()


def build_loop(run: RunConfig, ranks: Ranks, peaks: dict[str, int]) -> TrainingLoop:
    """Build reference, engine and loop as ``dualtok train`` does, and note the peak of memory of each."""
    assert run.train is not None
    assert run.model is not None
    assert run.reference is not None
    layout = build_layout(ranks)
    reference = build_reference(run.reference, Path(run.reference.origin), layout)
    peaks["reference"] = restart_peak()
    log(ranks, f"reference built: {resident('VmRSS') / 2**30:.2f} GiB")
    stream, validation = open_streams(run, load_sources(run.data, "train"), ("train", "validation"), ranks)
    total = run.train.steps or 0
    engine = build_engine(
        str(run.model.path),
        run.model,
        run.train,
        config=training_config(run.train, ranks.world_size),
        objective=build_objective("dual"),
        total_steps=total,
        layout=layout,
    )
    peaks["model"] = restart_peak()
    log(ranks, f"model built: {resident('VmRSS') / 2**30:.2f} GiB")
    return TrainingLoop(run, engine, stream, validation, total, reference=reference)


def report(ranks: Ranks, measured: list[tuple[dict[str, int], int]], options: argparse.Namespace) -> None:
    """Print what each rank held at most, phase by phase, and what was planned."""
    if not ranks.is_first:
        return
    shape = read_shape(llama(options.size))
    planned = estimate_memory(
        shape,
        Job(
            ranks=ranks.world_size,
            rows=BLOCKS // ranks.world_size,
            length=BLOCK_LENGTH,
            loss_memory_mib=LOSS_MIB,
            activation_checkpointing=True,
            offload_parameters="cpu",
            offload_optimizer=options.states,
            reference="offload",
            sub_group=SUB_GROUP,
            reduce_bucket=SUB_GROUP,
            prefetch=SUB_GROUP,
            max_reuse=0,
        ),
    ).largest
    print(f"{shape.parameters / 1e9:.3f} billion parameters, {ranks.world_size} ranks; plan per rank, GiB:")
    for part in ("parameters", "gradients", "optimizer", "activations", "head", "reference", "buffers", "total"):
        size = getattr(planned, part)
        print(f"  {part:12} memory {(size.device + size.host) / 2**30:6.2f}   disk {size.disk / 2**30:6.2f}")
    print("peak resident memory per rank, GiB, by phase:")
    for rank, (peaks, share) in enumerate(measured):
        phases = ", ".join(f"{name} {peak / 2**30:.2f}" for name, peak in peaks.items())
        print(f"  rank {rank}: {phases}; proportional set size now {share / 2**30:.2f}")
    total = sum(max(peaks.values()) for peaks, _ in measured)
    own = total - sum(peaks["libraries"] for peaks, _ in measured)
    plan = (planned.total.device + planned.total.host) * ranks.world_size
    print(
        f"sum of the ranks' peaks {total / 2**30:.2f} GiB; without the libraries {own / 2**30:.2f}, planned "
        f"{plan / 2**30:.2f}: measured / planned = {own / plan:.2f}"
    )


def llama(size: str) -> PretrainedConfig:
    """Return the model's configuration."""
    shape: dict[str, Any] = SIZES[size]
    config: PretrainedConfig = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        num_key_value_heads=KEY_VALUE_HEADS[size],
        tie_word_embeddings=False,
        max_position_embeddings=2 * BLOCK_LENGTH,
        **shape,
    )
    return config


def log(ranks: Any, line: str) -> None:
    """Print a line on rank 0 at once."""
    if ranks.is_first:
        print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def proportional() -> int:
    """Return this process's resident bytes, pages that others map too counted in parts."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def restart_peak() -> int:
    """Return the peak of this process's resident memory since the last call, and forget it."""
    peak = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def watch_memory() -> None:
    """End the job before it troubles others on the machine."""
    while True:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        assert found is not None
        if int(found[1]) * 1024 < LEAST_FREE:
            print("less than 1 GiB of memory is free: the job ends itself", flush=True)
            os._exit(3)
        time.sleep(0.2)


def return_freed_memory() -> None:
    """Make glibc give memory of a mebibyte and more back when it is freed.

    By itself it learns to keep freed pieces of up to 32 MiB for later, between which others lie: at 1.1 billion
    parameters the ranks held 3 GiB each that no tensor used.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if ctypes.CDLL(None).mallopt(mmap_threshold, 2**20) != 1:
        print("mallopt has no effect here: ranks will hold more memory than they use", flush=True)


def multiply_in_float32() -> None:
    """Multiply bf16 matrices in float32 and round the product, on cores without bf16 instructions.

    There PyTorch's own bf16 kernels are 7 to 200 times slower than its float32 ones. Sums are float32 in both.
    """
    library = torch.library.Library("aten", "IMPL")

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros((), dtype=torch.float32)
        return torch.addmm(nothing, a.float(), b.float(), beta=0).to(a.dtype)

    library.impl("mm", multiply, "CPU")
    multiply_in_float32.library = library  # type: ignore[attr-defined]  # it ends with its owner


def prepare(shared: Path, folder: Path, config: PretrainedConfig) -> DataConfig:
    """Write the blocks, once, and the weights of reference and model."""
    shared.mkdir(parents=True, exist_ok=True)
    data = prepared_corpus(shared, BLOCK_LENGTH)
    for name, seed in (("reference", 1), ("start", 2)):
        if not (folder / name / "config.json").is_file():
            write_fresh_weights(config, seed, folder / name, dtype=torch.bfloat16)
    return data


def write_deepspeed(path: Path, states: Path, where: str) -> str:
    """Write this rank's DeepSpeed JSON. The defaults of 500 million elements and more would outweigh the model."""
    optimizer: dict[str, Any] = {"device": where, "pin_memory": False}
    if where == "nvme":
        states.mkdir(parents=True, exist_ok=True)
        optimizer |= {"nvme_path": str(states), "buffer_count": 4}
    zero = {
        "stage": 3,
        "sub_group_size": SUB_GROUP,
        "reduce_bucket_size": SUB_GROUP,
        "stage3_prefetch_bucket_size": SUB_GROUP,
        "stage3_max_live_parameters": SUB_GROUP,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 10_000,
        "offload_param": {"device": "cpu", "pin_memory": False},
        "offload_optimizer": optimizer,
    }
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


if __name__ == "__main__":
    main()
