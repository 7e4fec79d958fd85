"""What only several ranks can find out, each check made by all of them: collectives, gradients, loss kernels.

    torchrun --nproc-per-node 2 -m dualtok.doctor.rank_checks

Rank 0 prints each result as soon as it has it, so that a later check that hangs takes nothing away.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dualtok.config.train import KERNEL_PRECISIONS
from dualtok.distributed.deepspeed_config import WRONG_GRADIENTS
from dualtok.distributed.forward_only import quiet_deepspeed
from dualtok.distributed.ranks import join_ranks, leave_ranks
from dualtok.doctor.result import CheckResult, judged
from dualtok.errors import ConfigError
from dualtok.model.load import DTYPES
from dualtok.model.loss_backends import FALLBACK, KERNELS, MODULES, PACKAGES, check_backend
from dualtok.objective.chunked_cross_entropy import linear_cross_entropy
from dualtok.train.engines.gradient_check import TOLERANCE, gradient_error

if TYPE_CHECKING:
    from dualtok.distributed.ranks import Ranks
    from dualtok.objective.chunked_cross_entropy import LinearCrossEntropy

LINE, DOING = "DUALTOK-DOCTOR ", "DUALTOK-DOING "
"""What begins a line with a result, and one that says what comes next."""
NAMES = ("collectives", "gradients", "loss kernels")
ACCELERATOR_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
SLOW = {"cpu": 0.05, "accelerator": 2.0}
"""GB/s of bus bandwidth below which something is wrong rather than slow: a wrong interface, no NVLink or PCIe peers."""
GRADIENT_STAGES = (1, 3)
TIMEOUT_MINUTES = 3.0
"""For one collective, after all have joined; the first start may compile an operator before it."""


def check_collectives(ranks: Ranks) -> CheckResult:
    """Compare sums over ranks with what they must be, and measure latency and bandwidth."""
    name, size = NAMES[0], (CPU_BYTES if ranks.device.type == "cpu" else ACCELERATOR_BYTES) // 4
    if ranks.world_size == 1:
        return CheckResult(name, "not-run", "one rank has nobody to talk to")
    backend = dist.get_backend()
    one = torch.ones(1, device=ranks.device)
    latency = _seconds(ranks, lambda: dist.all_reduce(one.clone()), times=20)
    values = torch.full((size,), float(ranks.rank + 1), device=ranks.device)
    total = ranks.sum(values)
    wrong = float((total != ranks.world_size * (ranks.world_size + 1) / 2).sum())
    share = (ranks.world_size - 1) / ranks.world_size
    reduce = 2 * share * size * 4 / _seconds(ranks, lambda: dist.all_reduce(total), times=3)
    part = values[: size // ranks.world_size].clone()
    parts = [torch.empty_like(part) for _ in range(ranks.world_size)]
    gather = (
        share * part.numel() * ranks.world_size * 4 / _seconds(ranks, lambda: dist.all_gather(parts, part), times=3)
    )
    wrong += sum(float((received != rank + 1).sum()) for rank, received in enumerate(parts))
    found = (
        f"{ranks.world_size} ranks over {backend}: bus bandwidth of all-reduce {reduce / 1e9:.2f} GB/s, of "
        f"all-gather {gather / 1e9:.2f} GB/s; latency {latency * 1e6:,.0f} microseconds"
    )
    if float(ranks.sum(torch.tensor([wrong], device=ranks.device))):
        remedy = "a device or link is broken: start fewer devices to find it; NCCL_P2P_DISABLE=1 tells links apart"
        return CheckResult(name, "fail", f"{found}; sums or gathered values are wrong", remedy)
    if min(reduce, gather) < 1e9 * SLOW["cpu" if ranks.device.type == "cpu" else "accelerator"]:
        return CheckResult(
            name,
            "warn",
            found,
            "look at the interface with NCCL_DEBUG=INFO (or gloo's), and set "
            "NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME, NCCL_IB_HCA",
        )
    return CheckResult(name, "ok", found)


def _seconds(ranks: Ranks, action: object, *, times: int) -> float:
    """Return the mean seconds of a collective on the slowest rank, after one that warms up."""
    assert callable(action)
    action()
    _settle(ranks)
    started = time.perf_counter()
    for _ in range(times):
        action()
    _settle(ranks)
    spent = torch.tensor([(time.perf_counter() - started) / times], device=ranks.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _settle(ranks: Ranks) -> None:
    dist.barrier()
    if ranks.device.type != "cpu":
        torch.get_device_module(ranks.device).synchronize()


def check_gradients(ranks: Ranks) -> CheckResult:
    """Compare DeepSpeed's gradients under accumulation with autograd's."""
    name = NAMES[1]
    errors = {stage: gradient_error(ranks, stage) for stage in GRADIENT_STAGES}
    found = ", ".join(f"ZeRO-{stage} {error:.1e}" for stage, error in errors.items())
    found = f"relative error under accumulation on {ranks.world_size} ranks: {found}"
    wrong = [f"{found} (allowed {TOLERANCE})"] if any(not error <= TOLERANCE for error in errors.values()) else []
    first, fixed = WRONG_GRADIENTS
    return judged(name, wrong, found, f"install deepspeed==0.19.8; {first} to before {fixed} scale wrongly")


def check_loss_kernels(ranks: Ranks, kernels: dict[str, LinearCrossEntropy] | None = None) -> CheckResult:
    """Compare every loss kernel that can run here with the formula, in each precision that it trains in.

    Args:
        ranks: each looks on its own device.
        kernels: name -> kernel; None takes dualtok's own and those that are installed for the device.
    """
    name, remarks = NAMES[2], []
    if kernels is None:
        kernels = {"torch": linear_cross_entropy}
        for backend, kernel in KERNELS.items():
            if ranks.device.type == "cpu":
                remarks.append(f"{backend} needs a GPU")
            elif find_spec(MODULES[backend]) is None:
                remarks.append(f"{backend} is not installed ({PACKAGES[backend]})")
            else:
                kernels[backend] = kernel
    problems = []
    for backend, kernel in kernels.items():
        for precision in KERNEL_PRECISIONS.get(backend, tuple(DTYPES)):
            try:
                check_backend(backend, kernel, ranks.device, DTYPES[precision])
            except ConfigError as error:
                problems.append(f"rank {ranks.rank}, {precision}: {error}")
    everywhere = [problem for part in ranks.gather_objects(problems) for problem in part]
    if everywhere:
        return CheckResult(name, "fail", "; ".join(everywhere), f"{FALLBACK}, or install another version of the kernel")
    return CheckResult(
        name, "ok", "; ".join([f"losses and weighted gradients are right: {', '.join(kernels)}", *remarks])
    )


def main() -> int:
    """Join the ranks and make the checks; rank 0 prints the results."""
    _print(int(os.environ.get("RANK", "0")), DOING + "joining the ranks")
    ranks = join_ranks(timeout_minutes=TIMEOUT_MINUTES)
    quiet_deepspeed()
    for name, check in zip(NAMES, (check_collectives, check_gradients, check_loss_kernels), strict=True):
        _print(ranks.rank, DOING + name)
        result = check(ranks)
        _print(ranks.rank, LINE + json.dumps(asdict(result)))
    leave_ranks()
    return 0


def _print(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
