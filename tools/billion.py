"""A model of 1.1 billion parameters on a small machine: dual-loss steps with a reference of the same size.

ZeRO-3 keeps weights and gradients in host memory and the optimiser's states in files (``--states``), 12 bytes per
parameter that are read and written once per step. The reference is a second, forward-only ZeRO-3 engine in host memory.
All weights are random and written piece by piece.

    python -m torch.distributed.run --standalone --nproc-per-node=2 tools/billion.py [--size 1.1b] [--steps 2]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_support import prepared_corpus
from transformers import AutoConfig, PretrainedConfig

from dualtok.engine.build import build_engine
from dualtok.engine.config import TrainConfig
from dualtok.engine.deepspeed_config import training_config
from dualtok.engine.distributed import join_ranks, leave_ranks
from dualtok.engine.layout import build_layout
from dualtok.engine.loop import TrainingLoop
from dualtok.engine.reference import build_reference
from dualtok.engine.train import open_streams
from dualtok.model.config import ModelConfig
from dualtok.model.fresh import write_fresh_weights
from dualtok.monitor.events import EventWriter
from dualtok.objective.loss import build_objective
from dualtok.plan.memory import Job, estimate_memory
from dualtok.reference.config import ReferenceConfig
from dualtok.run import RunConfig

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.1b": {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12, "num_attention_heads": 10},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
KEY_VALUE_HEADS = {"tiny": 2, "0.1b": 2, "1.1b": 4}
VOCABULARY, BLOCK_LENGTH, BLOCKS = 32_000, 128, 2
SUB_GROUP = 20_000_000
"""Elements that the optimiser works on at once; the embeddings are one sub-group, however large."""
LEAST_FREE = 2**30
"""Bytes of free memory below which the job ends itself, before it troubles others."""


def main() -> None:
    """Train some steps and print losses and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--states", choices=("nvme", "cpu"), default="nvme", help="where the optimiser's states lie")
    parser.add_argument("--folder", type=Path, default=Path("runs/billion"), help="weights, data and states")
    options = parser.parse_args()
    threading.Thread(target=_watch_memory, daemon=True).start()
    ranks = join_ranks()
    base = resident("VmRSS")
    folder = options.folder / options.size
    config = llama(options.size)
    data = ranks.first_does(lambda: _prepare(options.folder, folder, config))
    zero = _write_deepspeed(folder / f"deepspeed-{ranks.rank}.json", folder / "states", options.states)
    settings = TrainConfig(
        learning_rate=1e-4, batch_size=BLOCKS, steps=options.steps, deepspeed=zero, precision="bf16",
        schedule="constant", loss_memory_mib=64,
    )  # fmt: skip
    frozen = ReferenceConfig(
        model=str(folder / "reference"), mode="offload", precision="bf16", batch_size=BLOCKS // ranks.world_size,
        deepspeed=zero,
    )  # fmt: skip
    run = RunConfig(
        data=data, objective="dual", output_dir=str(folder / "run"), train=settings, reference=frozen,
        model=ModelConfig(path=str(folder / "start")),
    )  # fmt: skip
    layout = build_layout(ranks)
    say(ranks, f"{options.size}: {sum(f.stat().st_size for f in (folder / 'start').glob('*.safetensors')):,} bytes of "
               f"weights on {ranks.world_size} ranks, libraries {base / 2**30:.2f} GiB per rank; reference ...")  # fmt: skip
    reference = build_reference(frozen, folder / "reference", layout)
    say(ranks, f"reference built, {resident('VmRSS') / 2**30:.2f} GiB resident per rank; model ...")
    stream, validation = open_streams(run, _manifest(data), ("train", "validation"), ranks)
    engine = build_engine(
        folder / "start", run.model, settings, config=training_config(settings, ranks.world_size),
        objective=build_objective("dual", run.selection, run.goldfish), total_steps=options.steps,
        layout=layout,
    )  # fmt: skip
    built = resident("VmHWM")
    say(ranks, f"model built, {resident('VmRSS') / 2**30:.2f} GiB resident per rank, peak {built / 2**30:.2f}")
    loop = TrainingLoop(run, engine, stream, validation, options.steps, reference=reference)
    batches = loop.batches()
    for _ in range(options.steps):
        started = time.perf_counter()
        outcome = loop.step(batches, EventWriter(None))
        say(ranks, f"step {outcome.step}: loss {outcome.loss:.4f} hard {outcome.hard_loss} memorised "
                   f"{outcome.memorised_loss} norm {outcome.gradient_norm:.3f} {time.perf_counter() - started:.0f} s, "
                   f"rank 0 {resident('VmRSS') / 2**30:.2f} GiB")  # fmt: skip
    planned = estimate_memory(
        config, Job(ranks=ranks.world_size, zero_stage=3, precision="bf16", rows=BLOCKS // ranks.world_size,
                    length=BLOCK_LENGTH, loss_memory_mib=64, offload_parameters="cpu", offload_optimizer=options.states,
                    reference="offload", reference_precision="bf16", sub_group=SUB_GROUP, bucket=SUB_GROUP),
    )  # fmt: skip
    peaks = ranks.gather_objects((resident("VmHWM"), proportional(), base))
    if ranks.is_first:
        print(json.dumps(planned.as_dict(), indent=1))
        for rank, (peak, share, libraries) in enumerate(peaks):
            print(f"rank {rank}: peak resident {peak / 2**30:.2f} GiB (libraries before {libraries / 2**30:.2f}), "
                  f"proportional now {share / 2**30:.2f} GiB")  # fmt: skip
        total, own = sum(p[0] for p in peaks), sum(p[0] - p[2] for p in peaks)
        predicted = sum(stage.device.total + stage.host.total for stage in planned.stages) * ranks.world_size
        print(f"sum of peaks {total / 2**30:.2f} GiB; without libraries {own / 2**30:.2f}, predicted "
              f"{predicted / 2**30:.2f} GiB, ratio {own / predicted:.2f}")  # fmt: skip
    leave_ranks()


def llama(size: str) -> PretrainedConfig:
    """Return the model's configuration."""
    shape: dict[str, Any] = SIZES[size]
    return AutoConfig.for_model("llama", vocab_size=VOCABULARY, num_key_value_heads=KEY_VALUE_HEADS[size],
                                tie_word_embeddings=False, max_position_embeddings=2 * BLOCK_LENGTH, **shape)  # fmt: skip


def say(ranks: Any, line: str) -> None:
    """Print a line on rank 0 at once."""
    if ranks.is_first:
        print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def resident(field: str) -> int:
    """Return bytes of this process from /proc/self/status: ``VmRSS`` now, ``VmHWM`` at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def proportional() -> int:
    """Return this process's resident bytes, pages that others map too counted in parts."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _watch_memory() -> None:
    while True:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        assert found is not None
        if int(found[1]) * 1024 < LEAST_FREE:
            print("less than 1 GiB of memory is free: the job ends itself", flush=True)
            os._exit(3)
        time.sleep(0.2)


def _prepare(shared: Path, folder: Path, config: PretrainedConfig) -> Any:
    shared.mkdir(parents=True, exist_ok=True)
    data = prepared_corpus(shared, BLOCK_LENGTH)
    for name, seed in (("reference", 1), ("start", 2)):
        if not (folder / name / "config.json").is_file():
            write_fresh_weights(config, seed, folder / name, dtype=torch.bfloat16)
            config.save_pretrained(folder / name)
    ctypes.CDLL(None).malloc_trim(0)
    return data


def _manifest(data: Any) -> Any:
    from dualtok.data.manifest import load_manifest

    return load_manifest(data.dir)


def _write_deepspeed(path: Path, states: Path, where: str) -> str:
    optimizer = {"device": where, "pin_memory": False}
    if where == "nvme":
        states.mkdir(parents=True, exist_ok=True)
        optimizer |= {"nvme_path": str(states), "buffer_count": 4}
    zero = {
        "stage": 3, "sub_group_size": SUB_GROUP, "reduce_bucket_size": SUB_GROUP,
        "stage3_prefetch_bucket_size": SUB_GROUP, "stage3_max_live_parameters": SUB_GROUP,
        "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 10_000,
        "offload_param": {"device": "cpu", "pin_memory": False}, "offload_optimizer": optimizer,
    }  # fmt: skip
    path.write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": True}))
    return str(path)


if __name__ == "__main__":
    main()
