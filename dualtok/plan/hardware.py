"""What the planner assumes about machines: data sheets, and how much of them a training job reaches.

The shares of the peak are fitted to 32 published throughputs of llm-foundry (models of 1B, 3B, 13B, 30B and 70B
parameters on 8 to 64 GPUs); its 7B rows and torchtitan's 8B rows were left out of the fit and serve as the test
(``tools/check_plan.py speed``). What no published figure tells is marked as an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualtok.monitor.devices import PEAK_TFLOPS

GIB = 2**30
OVERLAPPED = 0.75
"""Share of ZeRO-3's communication that a step is longer by although it runs beside computation: it waits for the first
layers, and takes streaming multiprocessors and memory bandwidth from them. Fitted with the shares below."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach, NVLink or network; assumption, usual for nccl-tests."""
MEMORY_SHARE = 0.8
"""Share of the memory bandwidth that elementwise kernels reach; assumption, usual for stream benchmarks."""
PCIE_SHARE = 0.8
"""Share of PCIe's bandwidth that copies from pinned memory reach; assumption."""
USABLE = 0.92
"""Share of the accelerator's memory that is planned for; the rest is lost to fragments. Assumption."""
RUNTIME = 1.5 * GIB
"""Bytes that CUDA's context, NCCL's and cuBLAS' buffers take on each device. Assumption."""
COLLECTIVE_BASE, HOP_LOCAL, HOP_REMOTE = 14e-6, 1.9e-6, 4.0e-6
"""Seconds that a ring takes without data: once, per hop by NVLink, and per hop by network (NCCL 2.20's own model,
src/graph/tuning.cc, protocol LL128)."""
HOST_MEMORY_BANDWIDTH = 200e9
"""Bytes/s of a host's memory, for DeepSpeed's CPU Adam; assumption: half of what two sockets with DDR5 have."""
HOST_FLOPS = 2e12
"""FLOP/s of a host's cores in float32, for ``reference.mode: cpu``; assumption: 64 cores with AVX-512."""
NVME_BANDWIDTH = 6e9
"""Bytes/s of a host's local disks; assumption: one PCIe 4.0 disk."""
STORAGE_PER_HOST, STORAGE = 1e9, 20e9
"""Bytes/s that a host reads shards with, and that the storage gives to all of them together; assumptions."""


@dataclass(frozen=True)
class Device:
    """An accelerator: its data sheet, and the shares of its peak."""

    flops: float
    """Dense bf16 FLOP/s."""
    flops_fp32: float
    """FLOP/s in float32 without TF32, which PyTorch does not use by itself."""
    memory_bandwidth: float
    """Bytes/s."""
    memory: float
    """Bytes."""
    link: float
    """NVLink bytes/s in one direction."""
    pcie: float
    """PCIe bytes/s in one direction."""
    linear: float
    """Share of ``flops`` that matrix products with weights reach."""
    attention: float
    """Share of ``flops`` that fused attention reaches. Low, since llm-foundry's figures are of 2023's kernels."""

    def products(self, precision: str) -> float:
        """Return the FLOP/s that matrix products with weights reach."""
        return self.linear * (self.flops if precision == "bf16" else self.flops_fp32)

    def attentions(self, precision: str) -> float:
        """Return the FLOP/s that attention reaches; in float32 it runs beside the tensor cores like other products."""
        return self.attention * self.flops if precision == "bf16" else self.products(precision)


def _h100(memory_bandwidth: float, memory: float) -> Device:
    return Device(PEAK_TFLOPS["H100"] * 1e12, 67e12, memory_bandwidth, memory, 450e9, 64e9, 0.68, 0.15)


def _a100(memory_bandwidth: float, memory: float) -> Device:
    return Device(PEAK_TFLOPS["A100"] * 1e12, 19.5e12, memory_bandwidth, memory, 300e9, 32e9, 0.83, 0.27)


DEVICES = {
    "a100-40gb": _a100(1.555e12, 40 * GIB),
    "a100": _a100(2.039e12, 80 * GIB),
    "h100": _h100(3.35e12, 80 * GIB),
    "h200": _h100(4.8e12, 141 * GIB),
}
"""SXM modules. An H200 is taken for an H100 with other memory: no published figure was used."""


@dataclass(frozen=True)
class Cluster:
    """Hosts of equal accelerators."""

    device: Device
    nodes: int
    gpus: int
    """Per node."""
    gpu_memory: float
    """Bytes of each accelerator."""
    host_memory: float
    """Bytes of each host."""
    network: float
    """Bytes/s from a host to others, in one direction and over all of its adapters."""

    @property
    def ranks(self) -> int:
        """Accelerators in all."""
        return self.nodes * self.gpus

    def ring(self, sent: float, ranks: int, collectives: float) -> float:
        """Return the seconds of collectives over neighboring ranks, one after the other.

        A ring passes each boundary between hosts once, over all adapters of the host. If several groups share the
        hosts (more hosts than a group has ranks per host), each gets its share of the network.

        Args:
            sent: bytes that each rank sends in all of them.
            ranks: of the group, neighbors.
            collectives: how many there are.
        """
        if ranks == 1:
            return 0.0
        spanned = -(-ranks // self.gpus)
        bandwidth = self.device.link if spanned == 1 else min(self.device.link, self.network)
        hops = (ranks - spanned) * HOP_LOCAL + (spanned * HOP_REMOTE if spanned > 1 else 0.0)
        return sent / (LINK_SHARE * bandwidth) + collectives * (COLLECTIVE_BASE + hops)

    def to_neighbor_stage(self, sent: float, replicas: int) -> float:
        """Return the seconds in which each rank of a stage sends activations to the next one, all ranks at once."""
        local = replicas * 2 <= self.gpus
        return sent / (LINK_SHARE * (self.device.link if local else min(self.device.link, self.network / self.gpus)))
