"""The reference in a process of its own: in order, ahead of the training, and its end seen at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.data.folder import DataFolder
from dualtok.errors import ConfigError, DualtokError
from dualtok.model.load import load_causal_lm
from dualtok.model.losses import TokenLossModel
from dualtok.reference import background
from dualtok.reference.background import BackgroundReference, WorkerSettings, share_cores
from tests import warm
from tests.support import ROOT, environment, save_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.data.packing import Batch

ROWS = 4


@pytest.fixture(autouse=True)
def _workers_are_forked() -> Iterator[None]:
    with warm.spawning():
        yield


def test_the_worker_takes_the_memory_for_logits_that_any_model_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once handed a number of tokens over as MiB."""
    given: list[Any] = []

    class Spy(TokenLossModel):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            given.append((len(arguments), settings))
            super().__init__(*arguments, **settings)

    monkeypatch.setattr("dualtok.model.losses.TokenLossModel", Spy)
    threads = torch.get_num_threads()
    background._load(WorkerSettings(str(save_model(tmp_path / "model", seed=0)), "fp32", 8, threads))
    assert given == [(1, {})]
    with pytest.raises(TypeError):
        TokenLossModel(load_causal_lm(tmp_path / "model"), 2048)  # type: ignore[misc]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference") / "model", seed=1, initializer_range=0.15)


@pytest.fixture
def reference(model: Path) -> Iterator[BackgroundReference]:
    worker = BackgroundReference(WorkerSettings(str(model), "fp32", batch_size=3, threads=1), prefetch=2)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def drawn(small_corpus: dict[str, Any]) -> list[Batch]:
    return list(islice(DataFolder(small_corpus["dir"]).open("train").batches(0, ROWS), 8))


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.slow
@torch.no_grad()
def test_batches_come_in_order_with_their_losses(
    reference: BackgroundReference, model: Path, drawn: list[Batch]
) -> None:
    own = TokenLossModel(load_causal_lm(model)).eval()
    expected = [own(batch) for batch in drawn]
    found = []
    for number, batch in enumerate(reference.scored(iter(drawn), 4)):
        found.append(batch["reference_loss"])
        if number == 2:  # an evaluation, while other batches are in the making
            assert torch.allclose(reference.token_losses(drawn[7]), expected[7], atol=1e-5)
    assert len(found) == len(drawn)
    for losses, wanted in zip(found, expected, strict=True):
        assert torch.allclose(losses, wanted, atol=1e-5)
    # An iterator that is given up leaves nothing behind that would be taken for the next one's.
    given_up = reference.scored(iter(drawn), 1)
    next(given_up)
    del given_up
    again = next(reference.scored(iter(drawn[3:]), 1))
    assert torch.allclose(again["reference_loss"], expected[3], atol=1e-5)
    reference.token_losses(drawn[0])  # after it, every batch that was given up has come back
    assert not reference._ready, "results that nobody asks for are kept"
    assert not reference._abandoned


@pytest.mark.slow
def test_a_bounded_number_of_batches_is_scored_ahead(model: Path, drawn: list[Batch]) -> None:
    forwards: list[tuple[float, float]] = []
    reference = BackgroundReference(
        WorkerSettings(str(model), "fp32", batch_size=8, threads=1),
        prefetch=2,
        on_forward=lambda start, end: forwards.append((start, end)),
    )
    taken = 0

    def counted() -> Iterator[Batch]:
        nonlocal taken
        for batch in drawn:
            taken += 1
            yield batch

    scored = reference.scored(counted(), 1)
    ahead = []
    trained_until = time.monotonic()
    for number, _ in enumerate(scored):
        ahead.append(taken - number - 1)
        time.sleep(0.3)  # the training step
        trained_until = time.monotonic()
    reference.close()
    assert ahead == [2, 2, 2, 2, 2, 2, 1, 0]
    assert len(forwards) == len(drawn)
    assert forwards == sorted(forwards), "not one after the other"
    # While a step trains, the next two are scored; the last forward pass so begins three steps before the end.
    assert forwards[-1][1] < trained_until - 0.45


@pytest.mark.slow
def test_a_killed_worker_stops_the_training_at_once(reference: BackgroundReference, drawn: list[Batch]) -> None:
    scored = reference.scored(iter(drawn[:3]), 1)  # the last ones: nothing more is sent, which would fail by itself
    next(scored)
    time.sleep(0.5)  # the results of two more batches lie ready, and must not hide the death
    assert reference.process.pid is not None
    os.kill(reference.process.pid, signal.SIGKILL)
    reference.process.join()
    started = time.monotonic()
    with pytest.raises(DualtokError, match=r"background worker \(process \d+\) was killed by signal 9.*out of memory"):
        next(scored)
    reference.close()
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_an_exception_in_the_worker_arrives_with_its_traceback(
    reference: BackgroundReference, drawn: list[Batch]
) -> None:
    foreign = {**drawn[0], "input_ids": drawn[0]["input_ids"] + 10**6}  # ids that the embedding does not have
    started = time.monotonic()
    with pytest.raises(DualtokError, match=r"(?s)worker failed: Traceback.*in forward.*IndexError"):
        list(reference.scored(iter([drawn[0], foreign, *drawn]), 1))
    assert time.monotonic() - started < 30
    pid = reference.process.pid
    assert pid is not None
    assert ends(pid, 5)
    with pytest.raises(DualtokError):
        reference.token_losses(drawn[0])


@pytest.mark.slow
def test_what_the_worker_cannot_use_is_a_user_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference\.cores: \[4095\] cannot be used on this host.*choose among"):
        BackgroundReference(WorkerSettings(str(model), "fp32", 8, 1, cores=(4095,)), prefetch=1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither a model folder nor a hub model"):
        BackgroundReference(WorkerSettings(str(tmp_path), "fp32", 8, 1), prefetch=1)


@pytest.mark.slow
def test_a_worker_is_pinned_and_ends_with_the_training_however_that_ends(model: Path, tmp_path: Path) -> None:
    core = sorted(os.sched_getaffinity(0))[0]
    script = tmp_path / "job.py"
    script.write_text(f"""
import os, time
from dualtok.reference.background import BackgroundReference, WorkerSettings
if __name__ == "__main__":
    reference = BackgroundReference(WorkerSettings({str(model)!r}, "fp32", 8, 1, cores=({core},)), prefetch=1)
    print(reference.process.pid, sorted(os.sched_getaffinity(reference.process.pid)), flush=True)
    time.sleep(600)
""")
    job = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(PYTHONPATH=str(ROOT)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert job.stdout is not None
    pid, _, cores = job.stdout.readline().partition(" ")
    assert cores.strip() == f"[{core}]"
    assert alive(int(pid))
    job.kill()
    job.wait()
    assert ends(int(pid), 10), "the worker outlived a killed training process"


@pytest.mark.slow
def test_closing_does_not_wait_for_a_stopped_worker(model: Path) -> None:
    multiprocessing.set_executable(sys.executable)  # the very process must be stopped, not what stands for it
    reference = BackgroundReference(WorkerSettings(str(model), "fp32", batch_size=3, threads=1), prefetch=2)
    assert reference.process.pid is not None
    os.kill(reference.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    reference.close()
    assert time.monotonic() - started < 30
    assert ends(reference.process.pid, 10)


def test_cores_are_shared_by_the_ranks_of_a_host() -> None:
    assert share_cores(None, 1, 2) is None
    assert [share_cores((4, 5, 6, 7), rank, 2) for rank in range(2)] == [(4, 5), (6, 7)]
    with pytest.raises(ConfigError, match="lists 3 cores, which the 2 ranks of a host cannot share evenly"):
        share_cores((1, 2, 3), 0, 2)
