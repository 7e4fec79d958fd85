"""Where the time of a step goes from 8 to 16,384 GPUs, for 7B, 70B and 405B: figures and a table, all computed.

python tools/draw_scaling.py [--device h100] [--network 3200] [--out docs/assets/scaling.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from transformers import AutoConfig

from dualtok.plan.hardware import DEVICES, GIB, Cluster
from dualtok.plan.scaling import COUNTS, Family, scale
from dualtok.plan.shape import read_shape
from dualtok.plan.shapes import NAMED

if TYPE_CHECKING:
    from dualtok.plan.scaling import Point

MODELS = {"7B": "meta-llama/Llama-2-7b-hf", "70B": "meta-llama/Llama-2-70b-hf", "405B": "meta-llama/Llama-3.1-405B"}
FAMILIES: tuple[Family, ...] = ("zero3", "pipeline", "sharded_pipeline")
TITLES = {"zero3": "ZeRO-3", "pipeline": "pipeline x ZeRO-1", "sharded_pipeline": "sharded pipeline"}
SHOWN = (8, 64, 512, 4096, 16_384)
COLOURS = ("#4c72b0", "#dd8452", "#c44e52", "#8c8c8c", "#55a868")


def main() -> None:
    """Compute, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--network", type=float, default=3200, help="Gb/s from host to host")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2**22, help="of a step, while the replicas can share them")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("docs/assets/scaling.svg"))
    options = parser.parse_args()
    device = DEVICES[options.device]
    cluster = Cluster(device, 1, 8, device.memory, 2048 * GIB, options.network * 1e9 / 8)
    found: dict[tuple[str, Family], list[Point]] = {}
    for model in options.models:
        shape = read_shape(AutoConfig.for_model(**NAMED[MODELS[model]]))
        for family in FAMILIES:
            found[model, family] = scale(shape, family, cluster, length=options.length, tokens=options.tokens)
    draw(found, options.models, options.out)
    print("| model | GPUs | layout | micro-batches | tokens per step | tokens/s/GPU | MFU | exposed | bubble |")
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for model in options.models:
        for gpus in SHOWN:
            here = [point for family in FAMILIES for point in found[model, family] if point.gpus == gpus]
            print(
                row(model, max(here, key=lambda point: point.mfu))
                if here
                else f"| {model} | {gpus:,} | none fits |" + " |" * 6
            )


def row(model: str, point: Point) -> str:
    """Return a line of the table: the best layout on so many GPUs."""
    option, shares = point.option, point.shares
    return (
        f"| {model} | {point.gpus:,} | {option.name} | {option.job.micro_batches} | {point.tokens / 2**20:,.0f} Mi | "
        f"{option.tokens_per_second / point.gpus:,.0f} | {point.mfu:.1%} | {shares['exposed communication']:.0%} | "
        f"{shares['pipeline bubble']:.0%} |"
    )


def draw(found: dict[tuple[str, Family], list[Point]], models: list[str], out: Path) -> None:
    """Draw the shares of a step, a row per model and a column per family, and the utilization over them."""
    figure, axes = plt.subplots(
        len(models),
        len(FAMILIES),
        figsize=(12, 3.2 * len(models)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, model in enumerate(models):
        for column, family in enumerate(FAMILIES):
            draw_one(axes[line][column], found[model, family])
            axes[line][column].set_title(f"{model}, {TITLES[family]}", fontsize=10)
        axes[line][0].set_ylabel("share of a step's time")
    for axis in axes[-1]:
        axis.set_xlabel("GPUs")
    labels = {
        label: handle
        for row in axes
        for axis in row
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=6, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def draw_one(axis: Any, points: list[Point]) -> None:
    """Draw one panel."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(COUNTS[0], COUNTS[-1])
    axis.set_ylim(0, 1)
    axis.set_xticks(COUNTS[::2], [f"{count:,}" for count in COUNTS[::2]], fontsize=8)
    if not points:
        axis.text(0.5, 0.5, "fits on none", transform=axis.transAxes, ha="center")
        return
    gpus = [point.gpus for point in points]
    parts = {name: [point.shares[name] for point in points] for name in points[0].shares}
    axis.stackplot(gpus, *parts.values(), labels=list(parts), colors=COLOURS)
    axis.plot(gpus, [point.mfu for point in points], color="black", marker=".", label="MFU")


if __name__ == "__main__":
    main()
