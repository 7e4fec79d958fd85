"""The table of a machine's check, as docs/results/gpu.md summarizes it."""

from __future__ import annotations

from typing import Any

from gpu.commands import allowed_of, too_far
from gpu.sizes import sizes_here
from transformers import AutoConfig

from dualtok.monitor.devices import peak_tflops
from dualtok.plan.flops import flops_per_token
from dualtok.plan.shape import read_shape

RATIOS = (
    ("dual", "trainer", "dual step with stored scores / the Hugging Face Trainer's plain step"),
    ("dual", "naive", "dual step with stored scores / naive two-forward step"),
    ("dual", "plain", "dual step with stored scores / dualtok's plain step"),
    ("resident", "dual", "reference on the device / stored scores"),
    ("offload", "dual", "reference offloaded to the host / stored scores"),
    ("cpu", "dual", "small reference on host cores / stored scores"),
    ("adapter", "lora_plain", "LoRA: dual with the base as its reference / plain"),
)


def markdown(results: dict[str, Any]) -> str:
    """Return the rows of all measurements that were made."""
    rows = [("figure", "value"), ("---", "---")]
    machine = results.get("machine", {})
    if "device" in machine:
        memory = f", {machine['memory_gib']:.0f} GiB" if machine["memory_gib"] else ""
        rows.append(("device", f"{machine['device']}{memory}"))
        rows.append(("versions", ", ".join(f"{name} {number}" for name, number in machine["versions"].items())))
        sizes = sizes_here()
        rows.append((f"matrix product, {sizes.matrix}^3, {sizes.precision}", f"{machine['matrix_tflops']:.3g} TFLOP/s"))
        rows.append(("copy on the device, read and written", f"{machine['copy_gb_per_s']:,.0f} GB/s"))
    rows += _parity(results.get("parity", {})) + _commands(results) + _heads(results) + _steps(results)
    rows += [(name, f"failed: {figures['error']}") for name, figures in results.items() if "error" in figures]
    return "\n".join(f"| {figure} | {value} |" for figure, value in rows)


def _parity(figures: dict[str, Any]) -> list[tuple[str, str]]:
    if "unlike" not in figures:
        return []
    rows = [
        (
            f"parity over {figures['steps']} dual steps: largest difference from host cores",
            "of a loss in nats, of the gradient's norm relative to it",
        )
    ]
    for name, unlike in figures["unlike"].items():
        allowed = ", ".join(f"{value:g}" for value in allowed_of(name).values())
        fault = f", more than {allowed}: FAULT" if too_far(name, unlike) else ""
        rows.append((f"parity: {name}", f"{unlike['loss']:.1e}, {unlike['gradient_norm']:.1e}{fault}"))
    rows += [(f"parity: {name}", f"failed: {error}") for name, error in figures["failed"].items()]
    return rows + [(f"parity: {name}", "left out, for it needs two devices") for name in figures["left_out"]]


def _commands(results: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name.replace(":", ": "), f"{figures['found']} ({figures['seconds']:.0f} s)")
        for name, figures in results.items()
        if name.startswith("command:") and "found" in figures
    ]


def _heads(results: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, figures in results.items():
        if name.startswith("head:") and "seconds" in figures:
            tokens, hidden, vocabulary = figures["shape"]
            memory = "" if figures["gib"] is None else f", {figures['gib']:.2f} GiB"
            rows.append(
                (
                    f"output layer {tokens} x {hidden} x {vocabulary}, forward and backward: {name[5:]}",
                    f"{figures['seconds'] * 1e3:.1f} ms{memory}",
                )
            )
    return rows


def _steps(results: dict[str, Any]) -> list[tuple[str, str]]:
    steps = {
        name[5:]: figures for name, figures in results.items() if name.startswith("step:") and "seconds" in figures
    }
    peak = peak_tflops(results.get("machine", {}).get("device", ""))
    rows = []
    for name, figures in steps.items():
        speed = figures["tokens"] / figures["seconds"]
        value = f"{figures['seconds'] * 1e3:.1f} ms, {speed:,.0f} tokens/s, peak {figures['peak_gib']:.1f} GiB"
        if peak is not None and name in ("trainer", "plain", "dual"):
            value += f", MFU {speed * step_flops_per_token() / peak / 1e12:.1%}"
        rows.append((f"step: {name}", value))
        if phases := figures["phases"]:
            together = sum(phases.values())
            shares = ", ".join(f"{phase} {seconds / together:.1%}" for phase, seconds in phases.items())
            rows.append(
                (
                    f"step: {name}, phases by the run's timer",
                    f"{shares}; together {together / figures['mean']:.3f} of the mean step by the clock",
                )
            )
    for above, below, label in RATIOS:
        if above in steps and below in steps:
            rows.append((label, f"{steps[above]['seconds'] / steps[below]['seconds']:.3f}"))
            memory = steps[above]["peak_gib"] / steps[below]["peak_gib"]
            rows.append((f"{label}, peak memory", f"{memory:.3f}"))
    return rows


def step_flops_per_token() -> int:
    """Return the floating-point operations of a training step per token."""
    sizes = sizes_here()
    config = AutoConfig.for_model("llama", **sizes.model, tie_word_embeddings=False)
    return flops_per_token(read_shape(config), sizes.block_length)
