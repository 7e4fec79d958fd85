"""What accelerators can do at most, by their names; torch-free, so that the planner reads it too."""

from __future__ import annotations

PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200 NVL": 835.0, "H200": 989.0}
"""Dense bf16 TFLOP/s of devices by a part of their name, the more exact name first; NVIDIA's data sheets, where the
figures of Hopper devices are given with sparsity, that is doubled."""


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a known device, None for others."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)
