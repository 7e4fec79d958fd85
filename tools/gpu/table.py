"""The table of a machine's check, as it stands in docs/log.md."""

from __future__ import annotations

from typing import Any

from gpu.sizes import sizes_here
from transformers import AutoConfig

from dualtok.monitor.ranks import peak_tflops
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
    parity = results.get("parity", {})
    if "steps" in parity:
        label = f"parity over {parity['steps']} dual steps, {parity['compared']}: largest difference of the"
        rows.append((f"{label} loss, fp32", f"{parity['fp32_loss']:.2g} nats"))
        rows.append((f"{label} number of memorised tokens, fp32", f"{parity['fp32_sets']:.0f}"))
        rows.append((f"{label} loss, bf16 against fp32", f"{parity['bf16_loss']:.2g} nats"))
    rows += _heads(results) + _steps(results)
    rows += [(name, f"failed: {figures['error']}") for name, figures in results.items() if "error" in figures]
    return "\n".join(f"| {figure} | {value} |" for figure, value in rows)


def _heads(results: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, figures in results.items():
        if name.startswith("head:") and "seconds" in figures:
            tokens, hidden, vocabulary = figures["shape"]
            memory = "" if figures["gib"] is None else f", {figures['gib']:.2f} GiB"
            rows.append((f"output layer {tokens} x {hidden} x {vocabulary}, forward and backward: {name[5:]}",
                         f"{figures['seconds'] * 1e3:.1f} ms{memory}"))  # fmt: skip
    return rows


def _steps(results: dict[str, Any]) -> list[tuple[str, str]]:
    steps = {name[5:]: figures for name, figures in results.items()
             if name.startswith("step:") and "seconds" in figures}  # fmt: skip
    peak = peak_tflops(results.get("machine", {}).get("device", ""))
    rows = []
    for name, figures in steps.items():
        speed = figures["tokens"] / figures["seconds"]
        value = f"{figures['seconds'] * 1e3:.1f} ms, {speed:,.0f} tokens/s, peak {figures['peak_gib']:.1f} GiB"
        if peak is not None and name in ("trainer", "plain", "dual"):
            value += f", MFU {speed * step_flops_per_token() / peak / 1e12:.1%}"
        rows.append((f"step: {name}", value))
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
