"""This host: accelerator, memory, shared memory, limits, clock, network names."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import socket
from pathlib import Path

import psutil

from dualtok.distributed.ranks import SHARED_MEMORY
from dualtok.doctor.result import CheckResult, Subject, judged

# Imported where they are used, for what they take to load: DeepSpeed (2 s), torch (1 s).

GIB = 2**30
BUFFER_BYTES = 69 * 2**20
"""What DeepSpeed 0.19.8's all-reduce on CPUs takes of /dev/shm for each rank."""
FREE_SHARED_MEMORY = GIB
"""Enough for NCCL and for the workers that read data."""
FREE_MEMORY = 2 * GIB
FEW_FILES, ENOUGH_FILES = 512, 4096
"""Open files: what a small job needs; what sockets to many ranks and mapped shards need."""
UNSYNCHRONIZED = 5
"""What adjtimex returns (TIME_ERROR) when nothing keeps the kernel's clock right."""


def local_ranks(subject: Subject) -> int:
    """Return the ranks that the checks start on this host: one per accelerator; without one as many as the run has
    pipeline stages, at least 2."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return int(get_accelerator().device_count())
    stages = 1 if subject.run is None or subject.run.train is None else subject.run.train.stages
    return max(2, stages)


def check_accelerator(subject: Subject) -> CheckResult:
    """Say what DeepSpeed would train on; fail if a GPU is there that torch cannot use, or bf16 is asked for in vain."""
    import torch
    from deepspeed.accelerator import get_accelerator

    name, accelerator = "accelerator", get_accelerator()
    kind = accelerator.device_name()
    if kind == "cpu":
        if shutil.which("nvidia-smi") and os.environ.get("DS_ACCELERATOR") != "cpu":
            return CheckResult(
                name,
                "fail",
                f"nvidia-smi is here, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU",
                "install a torch built for this driver's CUDA, update the driver, or set DS_ACCELERATOR=cpu",
            )
        return CheckResult(name, "ok", f"none: training on {os.cpu_count()} CPU cores")
    count = accelerator.device_count()
    found = (
        f"{count} x {torch.cuda.get_device_name(0) if kind == 'cuda' else kind}, torch for CUDA {torch.version.cuda}"
    )
    if count == 0:
        return CheckResult(
            name,
            "fail",
            f"DS_ACCELERATOR={kind}, but there is none",
            "free the devices (CUDA_VISIBLE_DEVICES), or set DS_ACCELERATOR=cpu",
        )
    half = subject.run is None or subject.run.train is None or subject.run.train.precision == "bf16"
    if half and not accelerator.is_bf16_supported():
        return CheckResult(name, "fail", f"{found}: no bf16", "set train.precision=fp32")
    if kind == "cuda":
        free = [torch.cuda.mem_get_info(index) for index in range(count)]
        used = [index for index, (left, whole) in enumerate(free) if left < 0.9 * whole]
        if used:
            return CheckResult(
                name,
                "warn",
                f"{found}; in use by others: {', '.join(map(str, used))}",
                "end what `nvidia-smi` shows, or leave these out with CUDA_VISIBLE_DEVICES",
            )
    return CheckResult(name, "ok", found)


def check_memory(ranks: int) -> CheckResult:
    """Compare the host memory that is free, for this control group too, with what libraries alone take."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    found = f"{available / GIB:.1f} GiB free for {ranks} ranks"
    few = [f"{found}; the libraries alone take about 1 GiB per rank"] if available < FREE_MEMORY * ranks else []
    return judged("memory", few, found, "end other jobs, or use fewer ranks on this host", bad="warn")


def check_shared_memory(ranks: int, folder: Path = SHARED_MEMORY) -> CheckResult:
    """Compare the room in /dev/shm with what ranks on one host exchange there, and look for what dead jobs left."""
    name = "shared memory"
    free = shutil.disk_usage(folder).free
    needed = ranks * BUFFER_BYTES
    found = f"{free / GIB:.2f} GiB free in {folder}"
    remedy = (
        "in a container: --shm-size=8g (Kubernetes: an emptyDir of medium Memory); elsewhere: "
        f"mount -o remount,size=8g {folder}"
    )
    if free < needed:
        return CheckResult(name, "fail", f"{found}; {ranks} ranks need {needed / GIB:.2f}", remedy)
    unmapped = [path for path in folder.glob("deepspeed_allreduce_buffer_*") if not _is_mapped(path)]
    left = [size for path in unmapped if (size := _size(path)) is not None]
    if left:
        return CheckResult(
            name,
            "warn",
            f"{len(left)} buffers that dead jobs left in {folder}, {sum(left) / GIB:.2f} GiB of memory",
            f"rm {folder}/deepspeed_allreduce_buffer_*, when no job runs on this host",
        )
    if free < FREE_SHARED_MEMORY:
        return CheckResult(name, "warn", f"{found}; NCCL and readers of data want 1", remedy)
    return CheckResult(name, "ok", found)


def _size(path: Path) -> int | None:
    """Return a file's bytes; None if it is gone: a job that starts removes the name of its buffer."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _is_mapped(path: Path) -> bool:
    """Return whether a process has a file mapped; one of another user counts if it cannot be looked at."""
    for process in psutil.process_iter():
        try:
            if str(path) in Path(f"/proc/{process.pid}/maps").read_text():
                return True
        except OSError:
            continue
    return False


def check_limits() -> CheckResult:
    """Look at the limits of this shell's processes: open files, processes, address space, locked memory."""
    import torch

    files, processes, space, locked = (
        resource.getrlimit(which)[0]
        for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK)
    )
    words = {"open files": files, "processes": processes, "address space": space, "locked memory": locked}
    found = ", ".join(f"{word} {'unlimited' if limit < 0 else limit}" for word, limit in words.items())
    name = "limits"
    if 0 <= files < FEW_FILES:
        return CheckResult(name, "fail", f"{found}: too few open files", "ulimit -n 65536 (limits.conf: nofile)")
    few = {
        "ulimit -n 65536 (limits.conf: nofile)": 0 <= files < ENOUGH_FILES,
        "ulimit -u 65536 (limits.conf: nproc)": 0 <= processes < 4096,
        "ulimit -v unlimited": space >= 0,
        "ulimit -l unlimited, for RDMA": torch.cuda.is_available() and 0 <= locked < GIB,
    }
    remedies = [remedy for remedy, small in few.items() if small]
    if remedies:
        return CheckResult(name, "warn", found, "; ".join(remedies))
    return CheckResult(name, "ok", found)


def check_clock() -> CheckResult:
    """Ask the kernel whether something keeps its clock right."""
    name = "clock"
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(1024))  # struct timex, 208 bytes; modes = 0 only reads
    if state < 0:
        return CheckResult(name, "not-run", f"the kernel does not say: {os.strerror(ctypes.get_errno())}")
    problem = ["the kernel's clock is not synchronised"] if state == UNSYNCHRONIZED else []
    return judged(
        name,
        problem,
        "synchronised",
        "start chrony or systemd-timesyncd on the machine; of importance for several hosts: compare them with --hosts",
        bad="warn",
    )


def check_network() -> CheckResult:
    """Look whether the interfaces that NCCL and gloo were told to use exist, and whether this host knows its name."""
    name = "network"
    here = sorted(psutil.net_if_addrs())
    told = {
        variable: value
        for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        if (value := os.environ.get(variable))
    }
    for variable, value in told.items():
        if not value.startswith("^") and not any(_matches(part, here) for part in value.split(",")):
            remedy = f"set {variable} to the interface that reaches the other hosts (`ip -br addr`)"
            return CheckResult(name, "fail", f"{variable}={value}, but this host has {', '.join(here)}", remedy)
    host = socket.gethostname()
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        remedy = f"add a line with its address and {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return CheckResult(name, "warn", f"cannot resolve its own name {host}, by which gloo finds itself", remedy)
    chosen = ", ".join(f"{variable}={value}" for variable, value in told.items()) or "no interface prescribed"
    return CheckResult(name, "ok", f"{host} is {address}; {chosen}; interfaces {', '.join(here)}")


def _matches(wanted: str, interfaces: list[str]) -> bool:
    """NCCL takes a name for the start of one unless it begins with ``=``."""
    return wanted.removeprefix("=") in interfaces or any(interface.startswith(wanted) for interface in interfaces)
