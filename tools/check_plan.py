"""The planner against reality: resident memory of real ranks, and published throughput of real GPUs.

    python tools/check_plan.py memory [--size 0.1b] [--layout zero2 ...] [--out figures.json]
    python tools/check_plan.py speed [--markdown]

``memory`` trains two steps of the dual loss in each layout, one after the other, and compares by how much each rank's
resident memory grew, at its peak within the second step, with the bytes planned for its stage; it ends with status 1 if
the error of any rank is above 10 %. Growth counts from when the libraries are ready: a model of a few thousand
parameters was trained in the same layout before, so that all is loaded and set up. glibc is told to give freed memory
back (``MALLOC``), so that resident memory is what is in use.
``speed`` compares planned with published tokens per second and GPU; nothing is run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmark_support import rank_variables, torchrun
from rank_support import dual_engine, random_block, resident, untied_llama
from transformers import AutoConfig, PretrainedConfig

from dualtok.commands.plan.inputs import Material, job_of
from dualtok.config.data import DataConfig
from dualtok.config.model import ModelConfig
from dualtok.config.reference import ReferenceConfig
from dualtok.config.run import RunConfig
from dualtok.config.train import PipelineConfig, TrainConfig
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import Ranks, join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights
from dualtok.plan.hardware import DEVICES, GIB, Cluster
from dualtok.plan.memory import Job, estimate_memory
from dualtok.plan.shape import read_shape
from dualtok.plan.shapes import NAMED
from dualtok.plan.speed import step_time, tokens_per_second

LENGTH = 64
TOLERANCE = 0.2
"""Largest error of the planned speed."""
MEMORY_TOLERANCE = 0.1
"""Largest error of the memory planned for any rank, as a share of what it took."""
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc's settings in the measured ranks: one heap, and pieces from 1 MiB on given back to the system when freed."""
SIZES = {"tiny": (64, 2, 512), "small": (256, 6, 8000), "0.1b": (768, 12, 32_000), "0.3b": (1024, 24, 16_000)}
"""Name -> hidden size, layers, vocabulary; Llama with an untied head."""
SMALL_BUCKETS = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
STAGE_3 = {
    "stage": 3,
    **SMALL_BUCKETS,
    "stage3_prefetch_bucket_size": 5_000_000,
    "sub_group_size": 20_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 5_000_000,
}
IN_PIPELINE = {key: STAGE_3[key] for key in STAGE_3 if key not in ("stage3_prefetch_bucket_size", "sub_group_size")}
HOST = {"device": "cpu", "pin_memory": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"zero": {"stage": 1, **SMALL_BUCKETS}},
    "zero2": {"zero": {"stage": 2, **SMALL_BUCKETS}},
    "zero3": {"zero": STAGE_3},
    "zero3-offload": {"zero": {**STAGE_3, "offload_param": HOST, "offload_optimizer": HOST}},
    "pipeline": {"zero": {"stage": 1, **SMALL_BUCKETS}, "stages": 2},
    "sharded_pipeline": {"zero": IN_PIPELINE, "stages": 2},
}
"""Each on two ranks, the pipelines on two stages of two."""


def main() -> None:
    """Compare memory or speed, or be one of the measured ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    memory = verbs.add_parser("memory")
    memory.add_argument("--size", choices=SIZES, default="0.1b")
    memory.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    memory.add_argument("--out", type=Path, help="JSON file of the figures")
    speed = verbs.add_parser("speed")
    speed.add_argument("--markdown", action="store_true", help="the whole table")
    rank = verbs.add_parser("rank")
    rank.add_argument("layout")
    rank.add_argument("size")
    rank.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.verb == "rank":
        measure_rank(options.layout, options.size, options.folder)
    elif options.verb == "memory":
        compare_memory(options)
    else:
        compare_speed(options)


def compare_memory(options: argparse.Namespace) -> None:
    """Measure the layouts one after the other, print planned and measured bytes, and judge the worst rank."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ("tiny", options.size):
            write_fresh_weights(configuration(size), 0, Path(folder) / size)
        for layout in options.layout:
            rows.append(row := compare_layout(layout, options.size, Path(folder)))
            planned, measured, steady, start = (row[key] / 2**20 for key in ("planned", "measured", "steady", "start"))
            worst = row["by_rank"][row["worst"]]
            print(
                f"{layout:16} planned {planned:7,.0f} MiB per rank, measured {measured:7,.0f}: planned / measured "
                f"{row['ratio']:.3f} ({row['ranks']} ranks; between steps {steady:,.0f}, while built {start:,.0f}); "
                f"worst: rank {row['worst']} of stage {worst['stage']}, {worst['planned'] / 2**20:,.0f} / "
                f"{worst['peak'] / 2**20:,.0f} = {worst['planned'] / worst['peak']:.3f}",
                flush=True,
            )
    if options.out is not None:
        options.out.write_text(json.dumps({"size": options.size, "rows": rows}, indent=1) + "\n")
    beyond = [row["layout"] for row in rows if error_of(row["by_rank"][row["worst"]]) > MEMORY_TOLERANCE]
    if beyond:
        raise SystemExit(f"an error is above {MEMORY_TOLERANCE:.0%}: {', '.join(beyond)}")


def compare_layout(layout: str, size: str, folder: Path) -> dict[str, Any]:
    """Measure one layout; return bytes of each rank and means over them, planned / measured, and the worst rank."""
    run, ranks = run_of(layout, size, folder)
    command = torchrun(ranks, __file__, "rank", layout, size, str(folder))
    subprocess.run(command, env={**rank_variables(ranks), **MALLOC}, check=True, stdout=subprocess.DEVNULL)
    found = [json.loads((folder / f"{layout}-{rank}.json").read_text()) for rank in range(ranks)]
    shape = read_shape(configuration(size))
    estimate = estimate_memory(shape, job_of(run, Material(shape, shape, LENGTH, None), ranks))
    for row in found:
        total = estimate.stages[row["stage"]].total
        row["planned"] = total.device + total.host
    planned, measured, steady, start = (
        statistics.mean(row[key] for row in found) for key in ("planned", "peak", "steady", "start")
    )
    return {
        "layout": layout,
        "ranks": ranks,
        "parameters": shape.parameters,
        "planned": planned,
        "measured": measured,
        "ratio": planned / measured,
        "steady": steady,
        "start": start,
        "by_rank": found,
        "worst": max(range(ranks), key=lambda rank: error_of(found[rank])),
    }


def error_of(row: dict[str, int]) -> float:
    """Return by what share of its measured peak a rank's plan is wrong."""
    return abs(row["planned"] / row["peak"] - 1)


def compare_speed(options: argparse.Namespace) -> None:
    """Print planned beside published tokens per second and GPU, and the largest errors."""
    published = json.loads(Path(__file__).with_name("published_throughput.json").read_text())
    rows = [dict(zip(published["columns"], row, strict=True)) for row in published["rows"]]
    errors: dict[str, list[float]] = {"fitted": [], "7b, not fitted": [], "torchtitan, not fitted": []}
    lines = []
    for row in rows:
        planned = published_job(row, published["mpt"])
        error = planned / row["tokens_per_second"] - 1
        kind = {"llama-8b": "torchtitan, not fitted", "7b": "7b, not fitted"}.get(row["model"], "fitted")
        errors[kind].append(error)
        checkpointing = {True: "full", False: "none"}.get(row["checkpointing"], row["checkpointing"])
        lines.append(
            f"| {row['model']} | {row['device']} x {row['gpus']} | {row['length']:,} | {row['rows']} x "
            f"{row['micro_batches']} | {checkpointing} | {row['tokens_per_second']:,} | {planned:,.0f} | {error:+.1%} "
            f"| {kind} |"
        )
    if options.markdown:
        print("| model | devices | length | blocks x micro-batches | checkpointing | published | planned | error | |")
        print("|---|---|--:|---|---|--:|--:|--:|---|", *lines, sep="\n")
    for kind, found in errors.items():
        print(
            f"{kind}: {len(found)} rows, errors {min(found):+.1%} to {max(found):+.1%}, "
            f"mean size {statistics.mean(map(abs, found)):.1%}"
        )
    if max(abs(error) for found in errors.values() for error in found) > TOLERANCE:
        raise SystemExit(f"an error is above {TOLERANCE:.0%}")


def published_job(row: dict[str, Any], mpt: dict[str, list[int]]) -> float:
    """Return planned tokens per second and GPU of a published job.

    PyTorch's FSDP gathers like ZeRO-3 that keeps nothing; attention is fused and causal; all logits are kept. Selective
    checkpointing recomputes every other matrix product: half way between none and all.
    """
    if row["model"] in mpt:
        hidden, layers, heads = mpt[row["model"]]
        config = AutoConfig.for_model("mpt", d_model=hidden, n_layers=layers, n_heads=heads, vocab_size=50_368)
    else:
        config = AutoConfig.for_model(**NAMED["meta-llama/Llama-3.1-8B"])
    device = DEVICES[row["device"][:4]]
    if "500w" in row["device"]:  # torchtitan's H100s have HBM2e
        device = replace(device, memory_bandwidth=2.4e12, memory=96 * GIB)
    gigabits = 1600 if row["device"] == "a100" else 3200
    cluster = Cluster(device, -(-row["gpus"] // 8), min(8, row["gpus"]), device.memory, 1e12, gigabits * 1e9 / 8)
    shape, seconds = read_shape(config), []
    for again in {True: [True], False: [False], "selective": [True, False]}[row["checkpointing"]]:
        job = Job(
            ranks=row["gpus"],
            length=row["length"],
            rows=row["rows"],
            micro_batches=row["micro_batches"],
            activation_checkpointing=again,
            max_reuse=0,
            loss_memory_mib=10**6,
            reference="none",
            skips_masked=True,
            data_workers=1,
        )
        seconds.append(step_time(shape, job, cluster).total)
    return tokens_per_second(job, statistics.mean(seconds)) / row["gpus"]


def configuration(size: str) -> PretrainedConfig:
    """Return the Llama of a size."""
    hidden, layers, vocabulary = SIZES[size]
    return untied_llama(hidden, layers, vocabulary, LENGTH)


def run_of(layout: str, size: str, folder: Path) -> tuple[RunConfig, int]:
    """Return the run of a layout, as a user would write it, and its ranks."""
    stages = LAYOUTS[layout].get("stages", 1)
    file = folder / f"{layout}.deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": LAYOUTS[layout]["zero"]}))
    train = TrainConfig(
        learning_rate=1e-4,
        batch_size=4,
        gradient_accumulation=2,
        steps=10**6,
        precision="fp32",
        deepspeed=str(file),
        loss_memory_mib=16,
        engine="zero" if stages == 1 else layout,
        pipeline=None if stages == 1 else PipelineConfig(stages=stages),
    )
    run = RunConfig(
        data=DataConfig(dir=str(folder / "data"), block_length=LENGTH),
        output_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder / size)),
        train=train,
        reference=ReferenceConfig(model=str(folder / size)),
    )
    return run, 2 * stages


def measure_rank(layout: str, size: str, folder: Path) -> None:
    """Train in a layout, first a tiny model and then the one to be measured, and write down this rank's growth."""
    ctypes.CDLL(None).malloc_trim(0)
    ranks = join_ranks()
    train_two_steps(layout, "tiny", folder, ranks)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    ranks.barrier()
    figures = train_two_steps(layout, size, folder, ranks)
    (folder / f"{layout}-{ranks.rank}.json").write_text(json.dumps(figures))
    leave_ranks()


def train_two_steps(layout: str, size: str, folder: Path, ranks: Ranks) -> dict[str, int]:
    """Build an engine, train two steps, and return the growth of resident bytes in each phase."""
    before = restart_peak()
    own = folder / f"rank-{ranks.rank}"  # each rank writes its own copy of the JSON
    own.mkdir(exist_ok=True)
    run, _ = run_of(layout, size, own)
    assert run.train is not None
    layout = build_layout(ranks, run.train.stages)
    engine: Any = dual_engine(folder / size, run.train, layout)
    start = resident("VmHWM") - before
    generator = torch.Generator().manual_seed(layout.data_parallel.rank)
    vocabulary = SIZES[size][2]
    for _ in range(2):
        gc.collect()
        restart_peak()
        engine.train_step([random_block(generator, vocabulary, LENGTH) for _ in range(run.train.gradient_accumulation)])
    peak = resident("VmHWM") - before
    gc.collect()
    steady = resident("VmRSS") - before
    engine.engine.destroy()
    return {"stage": layout.stage, "start": start, "peak": peak, "steady": steady}


def restart_peak() -> int:
    """Forget the peak of this process' resident memory and return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


if __name__ == "__main__":
    main()
