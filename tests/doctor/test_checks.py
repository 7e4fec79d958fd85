"""Every check of one host, on what is really broken: a planted lock, an old version, a full disk, a wrong kernel."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.config.load import parse_run
from dualtok.distributed.ranks import ALONE
from dualtok.doctor import machine, storage
from dualtok.doctor.agent import connect, listen
from dualtok.doctor.building import check_compiler, check_locks, check_operators
from dualtok.doctor.machine import (
    check_accelerator,
    check_clock,
    check_limits,
    check_memory,
    check_network,
    check_shared_memory,
)
from dualtok.doctor.rank_checks import DOING, LINE, check_loss_kernels
from dualtok.doctor.rank_job import Ended, results_of
from dualtok.doctor.result import CheckResult, Subject, any_failed, as_json, print_table
from dualtok.doctor.run_file import check_run
from dualtok.doctor.storage import check_disk
from dualtok.doctor.training import check_training
from dualtok.doctor.versions import TESTED, check_deepspeed, check_versions
from dualtok.objective.chunked_cross_entropy import linear_cross_entropy
from tests.faults.harness import small_disk
from tests.model.test_loss_backends import crash, one_factor
from tests.support import ROOT, deepspeed_json, tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path


def plant(folder: Path, name: str, version: str) -> None:
    """Make an installed package look like another version of itself."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def failed(result: CheckResult, *words: str) -> None:
    assert result.status == "fail", result
    assert result.remedy
    for word in words:
        assert word in result.found, result.found


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in TESTED} == TESTED


def test_here_all_versions_are_as_tested() -> None:
    assert (check_versions().status, check_deepspeed().status) == ("ok", "ok")


@pytest.mark.parametrize("version", ["0.18.0", "0.19.2", "0.19.5"])
def test_a_deepspeed_with_wrong_gradients_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    plant(tmp_path, "deepspeed", version)
    monkeypatch.syspath_prepend(tmp_path)
    failed(check_deepspeed(), f"deepspeed {version}", "once too often under gradient accumulation")
    failed(check_versions(), f"deepspeed {version} is installed, dualtok needs <0.20,>=0.19.8")


def test_a_version_outside_the_requirements_fails_and_an_untested_one_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path / "other", "torch", "2.12.1+cu130")
    monkeypatch.syspath_prepend(tmp_path / "other")
    other = check_versions()
    assert (other.status, other.found) == ("warn", "never tested with torch 2.12.1+cu130 (tested: 2.13.0)")
    plant(tmp_path / "old", "transformers", "4.57.0")
    monkeypatch.syspath_prepend(tmp_path / "old")
    failed(check_versions(), "transformers 4.57.0")


def test_a_lock_of_a_killed_compilation_is_found_and_left(tmp_path: Path) -> None:
    assert check_locks(tmp_path).status == "ok"
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = check_locks(tmp_path)
    failed(found, str(lock))
    assert f"rm {lock}" in found.remedy
    assert lock.exists()
    behind = check_operators(["ShareMemCommBuilder"], locks=found)
    assert (behind.status, behind.found) == ("not-run", "would wait for the stale lock")


def test_a_compiler_that_does_not_work_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_compiler().status == "ok"
    other = tmp_path / "other" / "ninja"
    other.parent.mkdir()
    other.touch(mode=0o755)
    with monkeypatch.context() as changed:
        changed.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
        shadowed = check_compiler()
        assert shadowed.status == "warn"
        assert f"{other} comes before" in shadowed.found
    monkeypatch.setenv("CXX", "/bin/false")
    failed(check_compiler(), "/bin/false makes no working program")
    monkeypatch.setenv("CXX", "no-such-compiler")
    failed(check_compiler(), "there is no no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    failed(check_compiler(), "ninja")


@pytest.mark.slow
def test_an_operator_that_cannot_be_compiled_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    quick = check_operators(["ShareMemCommBuilder"], quick=True)
    assert (quick.status, "not built yet: ShareMemCommBuilder" in quick.found) == ("warn", True)
    monkeypatch.setenv("CXX", "/bin/false")
    failed(check_operators(["ShareMemCommBuilder"]), "cannot be built")


def test_shared_memory_that_is_too_small_or_littered_is_found(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", mebibytes=160) as folder:
        failed(check_shared_memory(4, folder), "4 ranks need 0.27")
        assert check_shared_memory(2, folder).status == "warn"
        with (folder / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0").open("wb") as stream:
            stream.truncate(2**20)
        left = check_shared_memory(2, folder)
        assert left.status == "warn"
        assert "1 buffers that dead jobs left" in left.found


def test_a_buffer_whose_name_goes_while_it_is_looked_at_is_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that starts removes the name as soon as all of its ranks have mapped the buffer."""
    buffer = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0"
    buffer.write_bytes(b"")

    def unmapped(path: Path) -> bool:
        path.unlink()
        return False

    monkeypatch.setattr(machine, "_is_mapped", unmapped)
    assert "dead jobs" not in check_shared_memory(1, tmp_path).found


def test_limits_that_are_too_low_are_found() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        failed(check_limits(), "open files 400")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        few = check_limits()
        assert (few.status, few.remedy) == ("warn", "ulimit -n 65536 (limits.conf: nofile)")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_little_memory_is_found() -> None:
    assert check_memory(1).status == "ok"
    assert check_memory(100_000).status == "warn"


def test_a_folder_that_is_full_or_cannot_be_written_is_found(tmp_path: Path) -> None:
    good = check_disk(tmp_path / "not" / "there", quick=True)
    assert good.status in ("ok", "warn"), good
    assert "MiB/s" in good.found
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    with small_disk(tmp_path / "disk", mebibytes=8) as folder:
        failed(check_disk(folder, quick=True), str(folder), "No space left on device")
        assert list(folder.iterdir()) == []
    locked = tmp_path / "locked"
    locked.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(locked)], check=True)
    try:
        failed(check_disk(locked / "run", quick=True), "Read-only file system")
    finally:
        subprocess.run(["umount", str(locked)], check=True)


def test_a_disk_that_is_small_or_slow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one, measured as ever, against limits at which it is."""
    monkeypatch.setattr(storage, "FREE_BYTES", 0)
    monkeypatch.setattr(storage, "SLOW", 0)
    assert check_disk(tmp_path, quick=True).status == "ok"
    monkeypatch.setattr(storage, "SLOW", 2**60)
    slow = check_disk(tmp_path, quick=True)
    assert (slow.status, "a faster disk" in slow.remedy) == ("warn", True)
    monkeypatch.setattr(storage, "FREE_BYTES", 2**60)
    small = check_disk(tmp_path, quick=True)
    assert (small.status, small.remedy.startswith("free space")) == ("warn", True)


def test_a_clock_that_nothing_keeps_right_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is one of 0 to 5; which of them it is here, the test does not know."""
    results = []
    for state in range(6):
        monkeypatch.setattr(machine, "UNSYNCHRONIZED", state)
        results.append(check_clock())
    if results[0].status == "not-run":  # containers may not ask
        assert {result.found for result in results} == {"the kernel does not say: Operation not permitted"}
        return
    assert sorted(result.status for result in results) == ["ok"] * 5 + ["warn"]
    found = next(result for result in results if result.status == "warn")
    assert (found.found, "chrony" in found.remedy) == ("the kernel's clock is not synchronised", True)


def test_an_interface_that_is_not_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert check_network().status in ("ok", "warn")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0,lo")
    assert check_network().status in ("ok", "warn"), "all but these"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib77")
    failed(check_network(), "NCCL_SOCKET_IFNAME=ib77, but this host has", "lo")


@pytest.mark.optional
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose torch sees no GPU")
def test_a_gpu_that_torch_cannot_see_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_accelerator(Subject(tmp_path)).status == "ok"
    tool = tmp_path / "nvidia-smi"
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert check_accelerator(Subject(tmp_path)).status == "ok", "DS_ACCELERATOR=cpu is a decision"
    monkeypatch.delenv("DS_ACCELERATOR")
    failed(check_accelerator(Subject(tmp_path)), "nvidia-smi is here, but torch")


def test_a_wrong_loss_kernel_is_found() -> None:
    right = check_loss_kernels(ALONE)
    assert right.status == "ok"
    assert "torch" in right.found
    failed(check_loss_kernels(ALONE, {"one factor": one_factor}), "rank 0, fp32", "gradient of the weight")
    failed(check_loss_kernels(ALONE, {"crash": crash}), "rank 0, bf16", "no kernel image is available")

    def half_only(hidden_nd: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        assert hidden_nd.dtype != torch.float32, "Backwards requires embeddings to be bf16 or fp16"
        return linear_cross_entropy(hidden_nd, *rest, **options)

    assert check_loss_kernels(ALONE, {"cut_cross_entropy": half_only}).status == "ok", "it does not train in fp32"
    failed(check_loss_kernels(ALONE, {"liger": half_only}), "rank 0, fp32", "bf16 or fp16")


def test_a_run_that_cannot_start_is_found(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    train = {"learning_rate": 1e-3, "batch_size": 8, "steps": 4, "precision": "fp32"}
    tree: dict[str, Any] = {
        "data": {"dir": small_corpus["dir"]},
        "objective": "causal_lm",
        "train": train,
        "model": {"config": tiny_llama_config()},
    }
    assert check_run(parse_run(tree), 2).status == "ok"
    failed(check_run(parse_run(tree), 3), "train.batch_size: 8 blocks")
    failed(check_run(parse_run({**tree, "data": {"dir": str(tmp_path)}}), 2), str(tmp_path))
    pipeline = {"engine": "pipeline", "pipeline": {"stages": 2}, "deepspeed": deepspeed_json("zero3")}
    failed(check_run(parse_run({**tree, "train": {**train, **pipeline}}), 2), "train.engine=pipeline keeps whole")
    assert check_run(parse_run({**tree, "train": {**train, **pipeline}}), 3).status == "warn"
    failed(check_run(parse_run({**tree, "objective": "dual"}), 2), "needs the section 'reference'")


def test_a_training_that_ends_badly_is_found(tmp_path: Path) -> None:
    words = "dualtok: error: rank 1: step 1: training diverged"
    failed(check_training(tmp_path, None, 1, lambda arguments: [Ended(1, f"noise\n{words}\n")]), words)
    failed(check_training(tmp_path, None, 1, lambda arguments: [Ended(None, "step 1")]), "no end before the deadline")
    failed(check_training(tmp_path, None, 1, lambda arguments: [Ended(0, "")]), "losses")


def test_what_ranks_did_not_get_to_says_why() -> None:
    done = CheckResult("collectives", "ok", "fast")
    output = f"{DOING}collectives\n{LINE}{json.dumps(done.__dict__)}\n{DOING}gradients\n"
    late = results_of([Ended(None, output)])
    assert late[0] == done
    failed(late[1], "no answer while gradients")
    assert [result.status for result in late] == ["ok", "fail", "not-run"]
    dead = results_of([Ended(1, "torchrun says\n[rank1]: RuntimeError: no such device\nmore"), Ended(None, "")])
    failed(dead[0], "ended while starting: [rank1]: RuntimeError: no such device")


def test_a_port_that_nobody_answers_is_found() -> None:
    port = listen("127.0.0.1")
    assert connect("127.0.0.1", port) is None
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert connect("127.0.0.1", closed.getsockname()[1]) == "Connection refused"
    assert connect("127.0.0.2", port) == "Connection refused", "it listens on the address of its name alone"
    with socket.create_server(("127.0.0.1", 0)) as other:
        code = f"from dualtok.doctor.agent import connect; print(connect('127.0.0.1', {other.getsockname()[1]}))"
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.1 400")
            connection.close()
            assert child.communicate()[0].strip() == "something else answers there"


def test_what_fails_must_have_a_remedy_and_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="without a remedy"):
        CheckResult("disk", "fail", "full")
    results = [CheckResult("disk", "fail", "full", "free some"), CheckResult("clock", "not-run", "no such call")]
    print_table(results)
    shown = capsys.readouterr().out
    assert "-> free some" in shown
    assert "1 fail, 1 not-run" in shown
    assert any_failed(results)
    assert json.loads(as_json(results))["checks"][1]["status"] == "not-run"
    assert not json.loads(as_json(results[1:]))["failed"]
