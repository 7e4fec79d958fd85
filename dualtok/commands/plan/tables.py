"""A plan for the terminal."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dualtok.plan import hardware
from dualtok.plan.hardware import GIB
from dualtok.plan.leak import LEVEL, load_map, verdict
from dualtok.plan.memory import estimate_memory

if TYPE_CHECKING:
    from dualtok.commands.plan.result import Plan
    from dualtok.plan.layouts import Option
    from dualtok.plan.leak import Expected, Span
    from dualtok.plan.memory import Bytes
    from dualtok.plan.shape import ModelShape

SHOWN = 10
"""Layouts in the table."""
PARTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "loss head",
    "reference": "reference",
    "buffers": "buffers",
    "total": "together",
}


def print_plan(found: Plan, console: Console | None = None) -> None:
    """Print all tables of a plan."""
    console = console or Console(width=120)
    cluster, shape = found.cluster, found.shape
    machines = f"{cluster.nodes} nodes x {cluster.gpus}, {cluster.gpu_memory / GIB:.0f} GiB each"
    console.print(
        f"{shape.parameters / 1e9:.3f} billion parameters, {shape.trained / 1e9:.3f} trained; {machines}, "
        f"{cluster.network * 8 / 1e9:,.0f} Gb/s between nodes"
    )
    if found.refused:
        console.print(f"the run's own layout does not go with {cluster.ranks} ranks: {found.refused}", style="red")
    chosen = found.chosen
    what = "the run's own layout" if chosen is found.own else "the best layout"
    console.print(_memory(chosen, shape, f"Memory per rank of the fullest stage in {what}: {chosen.name}"))
    console.print(_time(found, chosen))
    console.print(_layouts(found))
    console.print(_references(found))
    console.print(_budget(found))
    if found.expected is not None:
        console.print(_expected(found.expected))
        console.print(verdict(load_map(), found.expected))
    console.print(_assumptions(found))


def _memory(option: Option, shape: ModelShape, title: str) -> Table:
    """Return bytes by part and place of the fullest stage, activations with and without checkpointing."""
    table = Table(title=title, title_justify="left")
    for name in ("GiB per rank", "device", "host", "files"):
        table.add_column(name, justify="left" if name.startswith("GiB") else "right")
    largest = option.memory.largest
    for part, words in PARTS.items():
        size: Bytes = getattr(largest, part)
        name = words
        if part == "activations":
            again = option.job.activation_checkpointing
            other = estimate_memory(shape, option.job.with_checkpointing(not again)).largest.activations
            name += f" ({'without' if again else 'with'} checkpointing {other.device / GIB:,.2f})"
        table.add_row(name, *(f"{value / GIB:,.2f}" if value else "-" for value in (size.device, size.host, size.disk)))
    table.add_row("room left", f"{option.device_room / GIB:,.2f}", f"{option.host_room / GIB:,.1f} per node", "")
    return table


def _time(found: Plan, option: Option) -> Table:
    table = Table(title="Time of an optimizer step", title_justify="left")
    table.add_column("seconds")
    table.add_column("", justify="right")
    for field in fields(option.time):
        table.add_row(field.name, f"{getattr(option.time, field.name):,.4f}")
    table.add_row("together", f"{option.time.total:,.4f}")
    each = option.tokens_per_second / found.cluster.ranks
    table.add_row("tokens/s", f"{option.tokens_per_second:,.0f} ({each:,.0f} per device)")
    table.add_row("model FLOP utilization", f"{found.mfu:.1%}")
    return table


def _layouts(found: Plan) -> Table:
    fitting = [option for option in found.options if option.fits]
    best: dict[tuple[object, ...], Option] = {}
    for option in fitting or found.options:
        best.setdefault(_spread(option), option)
    shown = list(best.values())[:SHOWN]
    title = (
        f"Layouts that fit, fastest first, each with its best micro-batches ({len(fitting)} of {len(found.options)} "
        "tried fit)"
        if fitting
        else f"None of {len(found.options)} layouts fits; those that need least more memory"
    )
    table = Table(title=title, title_justify="left")
    for name in (
        "layout",
        "micro-batches",
        "blocks each",
        "device GiB",
        "host GiB",
        "step s",
        "tokens/s",
        "exposed",
        "bubble",
    ):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for option in shown:
        held, job, time = option.memory.largest.total, option.job, option.time
        table.add_row(
            option.name,
            str(job.micro_batches),
            str(job.rows),
            f"{held.device / GIB:,.1f}",
            f"{held.host / GIB:,.1f}",
            f"{time.total:,.3f}",
            f"{option.tokens_per_second:,.0f}",
            f"{time.communication / time.total:.0%}",
            f"{time.bubble / time.total:.0%}",
        )
    own = found.own
    if own is not None and any(option.job.micro_batches != own.job.micro_batches for option in shown):
        table.caption = (
            f"Layouts with other than {own.job.micro_batches} micro-batches rank tokens over micro-batches of another "
            "size (selection.scope)."
        )
    return table


def _spread(option: Option) -> tuple[object, ...]:
    """Return what distinguishes layouts but for micro-batches and checkpointing."""
    job = option.job
    return (job.engine, job.zero_stage, job.stages, job.keep_gathered, job.offload_optimizer, job.offload_parameters)


def _references(found: Plan) -> Table:
    table = Table(title="The reference in each mode (reference.mode)", title_justify="left")
    for name in ("mode", "device GiB per rank", "host GiB per node", "seconds per step"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode, (device, host, seconds) in found.references.items():
        table.add_row(mode, f"{device / GIB:,.2f}", f"{host / GIB:,.1f}", f"{seconds:,.4f}")
    return table


def _budget(found: Plan) -> Table:
    budget = found.budget
    table = Table(title="The whole run", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    unknown = "unknown: prepare the data, or give --tokens"

    def gib(size: int | None) -> str:
        return unknown if size is None else f"{size / GIB:,.2f} GiB"

    steps, tokens, hours, scoring = budget.steps, budget.tokens, budget.hours, budget.scoring_hours
    table.add_row("optimizer steps", unknown if steps is None else f"{steps:,}")
    table.add_row("tokens trained on", unknown if tokens is None else f"{tokens:,}")
    table.add_row("hours of these steps alone", unknown if hours is None else f"{hours:,.2f}")
    table.add_row("hours of the scoring pass before", unknown if scoring is None else f"{scoring:,.2f}")
    table.add_row("disk: shards of the split", gib(budget.shards))
    table.add_row("disk: reference losses", gib(budget.scores))
    table.add_row("disk: checkpoints, with one being written", gib(budget.checkpoints))
    return table


def _expected(said: Expected) -> Table:
    reads = f"{said.epochs:g} epoch{'s' if said.epochs != 1 else ''} over {said.documents:,} documents"
    table = Table(title="What it gains and gives away, as the map predicts (docs/does-it-pay.md)", title_justify="left")
    for name in ("", "expected", f"{LEVEL:.0%} of cases"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, span: Span, digits: int, unit: str = "") -> None:
        table.add_row(name, f"{span.value:.{digits}f}{unit}", f"{span.low:.{digits}f} to {span.high:.{digits}f}")

    row(f"plain training, {reads}: AUC of the strongest attack", said.auc, 2)
    row("the same: off the base model's held-out loss", said.gain, 2, " nats")
    if said.reference_gain is not None:
        row(f"the reference alone, {said.auxiliary:,} auxiliary documents", said.reference_gain, 2, " nats")
    return table


def _assumptions(found: Plan) -> str:
    device = found.cluster.device
    shares = f"{hardware.LINK_SHARE:.0%} of links, {hardware.MEMORY_SHARE:.0%} of device memory's bandwidth"
    return (
        f"Assumed: {device.linear:.0%} of the peak in matrix products and {device.attention:.0%} in attention (fitted "
        f"to llm-foundry's figures), {shares}, {hardware.USABLE:.0%} of its bytes less {hardware.RUNTIME / GIB:.1f} "
        "GiB; the rest is in docs/plan.md. Nothing was run."
    )
