"""What a rank holds under ``pipeline`` with ZeRO-1 and under ``sharded_pipeline``: counted and resident.

Starts four ranks (2 stages x 2) for each engine and prints, per rank: bytes of parameters and gradients between two
micro-batches, bytes of the optimizer, and by how much resident memory grew after the libraries were loaded, at its
peak while the engine was built and after some steps.

    python tools/bench_memory.py [--hidden 768] [--layers 12] [--vocabulary 16000] [--steps 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benchmark_support import rank_variables, torchrun
from rank_support import dual_engine, random_block, resident, untied_llama

from dualtok.config.train import PipelineConfig, TrainConfig
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

RANKS, STAGES, BLOCK_LENGTH = 4, 2, 64
ENGINES = {"pipeline": 1, "sharded_pipeline": 3}


def main() -> None:
    """Measure both engines, or be one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 768), ("layers", 12), ("vocabulary", 16_000), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank-of", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        measure_rank(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = untied_llama(options.hidden, options.layers, options.vocabulary, BLOCK_LENGTH)
        write_fresh_weights(config, 0, Path(folder) / "model")
        found = {engine: launch(engine, folder, options) for engine in ENGINES}
    report(found)


def launch(engine: str, folder: str, options: argparse.Namespace) -> list[dict[str, int]]:
    """Run all ranks of one engine and return what each measured."""
    sizes = [f"--vocabulary={options.vocabulary}", f"--steps={options.steps}"]
    command = torchrun(RANKS, __file__, "--rank-of", engine, "--folder", folder, *sizes)
    # One allocation arena: freed memory then goes back, and resident memory is what is in use.
    environment = {**rank_variables(RANKS), "MALLOC_ARENA_MAX": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return [json.loads((Path(folder) / f"{engine}-{rank}.json").read_text()) for rank in range(RANKS)]


def measure_rank(options: argparse.Namespace) -> None:
    """Build an engine, train some steps, and write down what this rank holds."""
    ranks = join_ranks()
    layout = build_layout(ranks, STAGES)
    ds = options.folder / f"{options.rank_of}.json"
    stage = {
        "stage": ENGINES[options.rank_of],
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 2_000_000,
    }
    ranks.first_does(lambda: ds.write_text(json.dumps({"zero_optimization": stage})) and None)
    train = TrainConfig(
        learning_rate=1e-4,
        batch_size=4,
        gradient_accumulation=2,
        steps=10**6,
        precision="fp32",
        engine=options.rank_of,
        pipeline=PipelineConfig(stages=STAGES),
        deepspeed=str(ds),
    )
    import deepspeed.runtime.pipe.engine  # noqa: F401  # the library's own memory is not what is measured

    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    engine = dual_engine(options.folder / "model", train, layout)
    peak = resident("VmHWM") - before
    counted = count_states(engine)
    generator = torch.Generator().manual_seed(layout.data_parallel.rank)
    for _ in range(options.steps):
        engine.train_step(
            [random_block(generator, options.vocabulary, BLOCK_LENGTH) for _ in range(train.gradient_accumulation)]
        )
    gc.collect()
    figures = {"stage": layout.stage, "peak_init": peak, "steady": resident("VmRSS") - before, **counted}
    (options.folder / f"{options.rank_of}-{ranks.rank}.json").write_text(json.dumps(figures))
    leave_ranks()


def count_states(trainer: Any) -> dict[str, int]:
    """Return figures that are filled in while training: parameters and gradients as one backward pass leaves
    them to the next one, and the optimizer's states after a step."""
    from deepspeed.runtime.pipe.schedule import BackwardPass

    engine, figures = trainer.engine, {"parameters": 0, "gradients": 0, "optimizer": 0}
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    backward, step = engine._INSTRUCTION_MAP[BackwardPass], engine._take_model_step

    def backward_and_count(self: Any, buffer_id: int) -> None:
        backward(self, buffer_id)
        figures["parameters"] = stored(t for p in parameters for t in (p.data, getattr(p, "ds_tensor", None)))
        averaged = [t for group in zero.averaged_gradients.values() for t in group or []]
        figures["gradients"] = stored([*(p.grad for p in parameters), *averaged])

    def step_and_count(arguments: Any) -> None:
        step(arguments)
        states = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        figures["optimizer"] = stored(t for t in states if t.numel() > 1)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, BackwardPass: backward_and_count}
    engine._take_model_step = step_and_count
    return figures


def stored(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes of the storages behind tensors, each counted once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def report(found: dict[str, list[dict[str, int]]]) -> None:
    """Print a table and the ratios."""
    print("| engine | rank | parameters | gradients | optimizer | steady growth | peak at init / steady |")
    print("|---|---|---|---|---|---|---|")
    for engine, rows in found.items():
        for rank, row in enumerate(rows):
            values = [f"{row[key] / 2**20:,.0f} MiB" for key in ("parameters", "gradients", "optimizer", "steady")]
            peak = row["peak_init"] / row["steady"]
            print(f"| {engine} | {rank} (stage {row['stage']}) | {' | '.join(values)} | {peak:.2f} |")
    for rank, (whole, sharded) in enumerate(zip(found["pipeline"], found["sharded_pipeline"], strict=True)):
        states = [row["parameters"] + row["gradients"] for row in (sharded, whole)]
        optimizer = sharded["optimizer"] / whole["optimizer"]
        print(
            f"rank {rank}, sharded_pipeline / pipeline: parameters + gradients {states[0] / states[1]:.3f}, "
            f"optimizer {optimizer:.3f}"
        )
    largest = max(row["peak_init"] / row["steady"] for row in found["sharded_pipeline"])
    print(f"largest peak at init / steady of sharded_pipeline: {largest:.2f}")


if __name__ == "__main__":
    main()
