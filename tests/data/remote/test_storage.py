"""Objects at an address arrive whole or not at all, whatever the server does, and no message gives a secret away."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import pickle
import socket
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dualtok.config.data import DataConfig, StreamConfig
from dualtok.data.remote.connection import Connection
from dualtok.data.remote.storage import BadShardError, Storage
from dualtok.errors import ConfigError, DataError
from tests.data.remote.servers import FAULTS, FaultServer, fault_server, stream_config, upload

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()
pytestmark = [pytest.mark.usefixtures("credentials", "short_pauses"), pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    (folder / "train").mkdir()
    (folder / "train" / "shard.arrow").write_bytes(CONTENT)
    return folder


@pytest.fixture(scope="module")
def uploaded(folder: Path, s3: str) -> str:
    return upload(folder, s3, "objects")


@pytest.fixture(params=["s3", "http"])
def remote(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[tuple[Storage, FaultServer]]:
    """Return the objects behind a faulty server: S3, or a plain web server."""
    if request.param == "http":
        with fault_server(folder) as server:
            yield Storage(server.url, stream_config(tmp_path)), server
        return
    uploaded = request.getfixturevalue("uploaded")
    with fault_server(request.getfixturevalue("s3")) as server:
        yield Storage(uploaded, stream_config(tmp_path, server.url)), server


def impatient(storage: Storage, **changes: object) -> Storage:
    """Return the same objects, connected, with a short time-out."""
    settings = stream_config(Path("unused"), storage._settings.endpoint_url, **{"timeout_seconds": 1.0, **changes})
    storage = Storage(storage.address, settings)
    storage.connect()
    return storage


REQUESTS = Counter(dict.fromkeys(FAULTS, 1)) + Counter(dropped=1)
"""Requests per attempt: aiohttp itself repeats one whose connection was closed without an answer."""


@pytest.mark.parametrize("fault", ["500", "truncated", "short", "flipped", "hang", "gone", "dropped"])
def test_a_passing_fault_is_tried_again_and_told(
    remote: tuple[Storage, FaultServer], fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, server = impatient(remote[0]) if fault == "hang" else remote[0], remote[1]
    server.spoil("shard.arrow", fault, times=2 * REQUESTS[fault])
    storage.fetch("train/shard.arrow", tmp_path / "copy", sha256=SHA256, size=len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert len(server.downloads) == 2 * REQUESTS[fault] + 1, "the file system must not repeat attempts of its own"
    told = [record.getMessage() for record in caplog.records if record.name.startswith("dualtok")]
    assert len(told) == 2
    for number, line in enumerate(told):
        assert f"{storage.address}/train/shard.arrow: attempt {number + 1} of 4 failed: " in line
        assert "again in " in line


REASONS = {
    "500": "Internal",
    "truncated": "",
    "short": r"51200 bytes arrived, the manifest says 102400",
    "flipped": "its checksum differs",
    "hang": "",
    "gone": "there is no such object",
    "dropped": "",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if fault == "hang" else ()) for fault in REASONS]
)
def test_a_lasting_fault_ends_in_an_error_that_tells_bad_objects_from_a_bad_connection(
    remote: tuple[Storage, FaultServer], fault: str, tmp_path: Path
) -> None:
    storage, server = impatient(remote[0]) if fault == "hang" else remote[0], remote[1]
    server.spoil("shard.arrow", fault)
    with pytest.raises(DataError) as caught:
        storage.fetch("train/shard.arrow", tmp_path / "copy", sha256=SHA256, size=len(CONTENT))
    assert f"{storage.address}/train/shard.arrow: given up after 4 attempts in " in str(caught.value)
    assert REASONS[fault] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, BadShardError) == (fault in ("short", "flipped", "gone"))
    assert len(server.downloads) == 4 * REQUESTS[fault]


def test_attempts_end_with_their_time(remote: tuple[Storage, FaultServer], tmp_path: Path) -> None:
    storage, server = impatient(remote[0], attempts=10_000, retry_seconds=0.5, timeout_seconds=10), remote[1]
    server.spoil("shard.arrow", "500")
    with pytest.raises(DataError, match="given up after"):
        storage.fetch("train/shard.arrow", tmp_path / "copy", sha256=SHA256)
    assert len(server.downloads) < 1000


def test_a_slow_transfer_is_not_a_dead_one(remote: tuple[Storage, FaultServer], tmp_path: Path) -> None:
    storage, server = impatient(remote[0]), remote[1]
    server.spoil("shard.arrow", "slow")
    started = time.monotonic()
    storage.fetch("train/shard.arrow", tmp_path / "copy", sha256=SHA256, size=len(CONTENT))
    assert time.monotonic() - started > 1.2, "the transfer must take longer than timeout_seconds for this test"
    assert len(server.downloads) == 1


def test_a_missing_small_object_is_told_at_once(remote: tuple[Storage, FaultServer]) -> None:
    storage, server = remote
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        storage.read("absent.json", patient=False)
    assert len(server.downloads) == 1
    assert storage.read("train/shard.arrow") == CONTENT


def _read(storage: Storage, results: multiprocessing.SimpleQueue[str]) -> None:
    results.put(hashlib.sha256(storage.read("train/shard.arrow")).hexdigest())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_makes_a_connection_of_its_own(remote: tuple[Storage, FaultServer], method: str) -> None:
    storage, _ = remote
    assert storage.read("train/shard.arrow") == CONTENT  # now this process has one
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=_read, args=(storage, results), daemon=True)
    process.start()
    process.join(30)
    assert not process.is_alive(), "the other process hangs"
    assert results.get() == SHA256
    assert storage.read("train/shard.arrow") == CONTENT


def test_written_objects_are_whole(uploaded: str, s3: str, tmp_path: Path, folder: Path) -> None:
    storage = Storage(uploaded, stream_config(tmp_path, s3))
    (tmp_path / "file").write_bytes(CONTENT[:1000])
    storage.put(tmp_path / "file", "scores/x/file.arrow")
    assert storage.read("scores/x/file.arrow") == CONTENT[:1000]
    assert storage.names("scores/x") == ["file.arrow"]
    assert storage.names("scores/none") == []
    with fault_server(folder) as server, pytest.raises(ConfigError, match="nothing can be written there"):
        Storage(server.url, stream_config(tmp_path)).put(tmp_path / "file", "file")


def test_a_server_that_never_answers_holds_nobody_up(uploaded: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT[:1000])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = Storage(uploaded, stream_config(tmp_path, endpoint, timeout_seconds=0.3, attempts=2))
        for action in (
            lambda: storage.put(tmp_path / "file", "x"),
            lambda: storage.names("train"),
            lambda: storage.read("x"),
        ):
            with pytest.raises(DataError, match="given up after 2 attempts"):
                action()


def test_a_full_disk_is_not_a_bad_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Connection, "download", full)
    storage = Storage("http://127.0.0.1:1/data", stream_config(tmp_path))
    with pytest.raises(DataError, match=r"No space left on device while .*data\.stream\.cache_dir") as caught:
        storage.fetch("shard.arrow", tmp_path / "copy", sha256=SHA256)
    assert not isinstance(caught.value, BadShardError)


SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"


def test_no_message_and_no_file_holds_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="dualtok")
    monkeypatch.setenv("MY_SECRET", SECRET)
    monkeypatch.setenv("MY_KEY", "AKIAIOSFODNN7")
    settings = stream_config(tmp_path, storage_environment={"key": "MY_KEY", "secret": "MY_SECRET"}, attempts=2)

    def fails(*_: object) -> None:
        raise RuntimeError(f"denied {SECRET} at https://me:{SECRET}@host/x?X-Amz-Signature=abc123&y=1 for good")

    monkeypatch.setattr(Connection, "download", fails)
    storage = Storage("s3://bucket/prepared", settings)
    with pytest.raises(DataError) as caught:
        storage.fetch("shard.arrow", tmp_path / "copy", sha256=SHA256)
    whole = f"{caught.value} {caplog.text} {asdict(settings)} {pickle.dumps(storage)!r}"
    assert SECRET not in whole
    assert "abc123" not in whole
    assert "RuntimeError: denied ... at https://...@host/x?... for good" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage_options": {"secret": SECRET}}, "data.stream.storage_options: 'secret' would be written to run.yaml"),
        ({"storage_options": {"client_kwargs": {"aws_session_token": SECRET}}}, "'aws_session_token' would be written"),
        ({"storage_environment": {"secret": SECRET}}, "data.stream.storage_environment.secret: needs the name of"),
        ({"endpoint_url": f"https://me:{SECRET}@host"}, "data.stream.endpoint_url: the address holds a user name"),
    ],
)
def test_settings_with_a_secret_are_refused_without_repeating_it(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"data\.stream") as caught:
        StreamConfig(**settings)  # type: ignore[arg-type]
    told = caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]  # what the command line prints
    assert message in told
    assert SECRET not in told


@pytest.mark.parametrize("address", [f"https://me:{SECRET}@host/data", f"https://host/data?sig={SECRET}"])
def test_addresses_with_a_secret_are_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(ValueError, match=r"data\.dir") as caught:
        DataConfig(dir=address)
    told = caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]
    assert "data.dir: the address holds a user name or a query" in told
    assert SECRET not in told


def test_what_cannot_be_reached_is_told_with_the_next_step(tmp_path: Path) -> None:
    settings = stream_config(tmp_path, attempts=1)
    for address, message in {
        "s33://bucket/data": r"no protocol 's33' \(did you mean 's3'\?\)",
        "abfs://bucket/data": r"pip install 'adlfs'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Storage(address, settings).read("manifest.json")
    missing = stream_config(tmp_path, storage_environment={"secret": "NOT_SET_ANYWHERE"})
    with pytest.raises(ConfigError, match="there is no environment variable NOT_SET_ANYWHERE"):
        Storage("s3://bucket/data", missing).read("manifest.json")
    with pytest.raises(ConfigError, match=r"data\.stream\.endpoint_url: has no effect on https://"):
        Storage("https://host/data", stream_config(tmp_path, "http://host")).read("manifest.json")


def test_stream_settings_without_an_address_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.stream: has no effect on a local folder"):
        DataConfig(dir="data", stream=StreamConfig(prefetch=3))
