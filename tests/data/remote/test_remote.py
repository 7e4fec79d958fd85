"""Data at an address is the same data: same batches, whoever reads, whatever fails on the way; or an error that names
the shard."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dualtok.config.data import DataConfig, MixConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import Manifest, load_manifest
from dualtok.data.remote.remote import RemoteFolder, location_of
from dualtok.data.remote.storage import BadShardError
from dualtok.data.stream.blocks import SKIPPED, BlockStream
from dualtok.data.stream.mixture import Mixture
from dualtok.data.tokenizer import load_data_tokenizer
from dualtok.errors import DataError
from dualtok.files import file_sha256
from dualtok.reference.fingerprint import Fingerprint
from dualtok.reference.stored import StoredLosses, score_path, scores_folder, write_index, write_scores
from tests.data.remote.servers import FaultServer, fault_server, stream_config, upload
from tests.data.support import BLOCK_LENGTH, whole_documents, write_prepared

if TYPE_CHECKING:
    from dualtok.data.packing import Batch

BLOCKS, LANES, GLOBAL = 90, 8, 8
EXPECTED = Fingerprint("weights", "tokenizer", "blocks", "fp32")
pytestmark = [pytest.mark.usefixtures("credentials", "short_pauses"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 90 blocks in 8 lanes of unequal length, three blocks per shard, each with reference losses."""
    folder = tmp_path_factory.mktemp("remote") / "prepared"
    write_prepared(folder, whole_documents(BLOCKS), lanes=LANES, rows_per_shard=3)
    draw, files = np.random.default_rng(0), {}
    for shard in load_manifest(folder).splits["train"].shards:
        path = score_path(scores_folder(folder, EXPECTED), "train", shard.file)
        write_scores(path, draw.random((shard.rows, BLOCK_LENGTH), dtype=np.float32), shard.sha256)
        files[f"train/{path.name}"] = file_sha256(path)
    write_index(scores_folder(folder, EXPECTED), EXPECTED, "models/reference", files)
    return folder


@pytest.fixture(scope="module")
def uploaded(folder: Path, s3: str) -> str:
    return upload(folder, s3, "prepared")


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    with fault_server(folder) as server:
        yield server


Opener = Callable[..., BlockStream]


@pytest.fixture
def remote(server: FaultServer, tmp_path: Path) -> Opener:
    """Return what opens the split, with stored losses, by way of the faulty server."""
    return partial(open_split, server.url, tmp_path)


def open_split(
    address: str,
    hosts: Path,
    *,
    cache: str = "cache",
    on_bad_shard: Any = "stop",
    endpoint: str | None = None,
    **settings: object,
) -> BlockStream:
    data = DataFolder(RemoteFolder(address, stream_config(hosts / cache, endpoint, **settings)))
    losses = StoredLosses(data, "train", EXPECTED, on_bad_shard=on_bad_shard)
    return data.open("train", seed=3, losses=losses, on_bad_shard=on_bad_shard)


@pytest.fixture
def at_s3(uploaded: str, s3: str, tmp_path: Path) -> Iterator[tuple[Opener, FaultServer]]:
    """Return what opens the split at moto's S3 by way of a faulty proxy, and the proxy."""
    with fault_server(s3) as proxy:
        yield partial(open_split, uploaded, tmp_path, endpoint=proxy.url), proxy


def local(folder: Path, **changes: Any) -> BlockStream:
    losses = StoredLosses(DataFolder(folder), "train", EXPECTED, **changes)
    return DataFolder(folder).open("train", seed=3, losses=losses, **changes)


def assert_same(batches: Iterator[Batch], expected: Iterator[Batch], count: int) -> None:
    for number in range(count):
        batch, other = next(batches), next(expected)
        assert batch.keys() == other.keys()
        for key, tensor in other.items():
            assert torch.equal(batch[key], tensor), f"batch {number}, {key}"


def shard_at(stream: BlockStream, sample: int) -> str:
    return stream.locate(sample)[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_batches_are_those_of_the_local_folder(
    request: pytest.FixtureRequest, folder: Path, kind: str, workers: int
) -> None:
    stream = (request.getfixturevalue("remote") if kind == "http" else request.getfixturevalue("at_s3")[0])()
    assert_same(stream.batches(16, GLOBAL, 1, 2, workers), local(folder).batches(16, GLOBAL, 1, 2), 30)
    rows = [row for _, segments in stream.sequential(4) for row in segments]
    assert rows == [row for _, segments in local(folder).sequential(4) for row in segments]
    address = DataFolder(stream._reader._location)
    assert address.documents("train").equals(DataFolder(folder).documents("train"))


def _first_batches(stream: BlockStream, results: multiprocessing.SimpleQueue[bytes]) -> None:
    results.put(pickle.dumps([batch["input_ids"][:, 0].tolist() for batch in islice(stream.batches(0, GLOBAL), 20)]))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_stream_that_is_in_use_goes_to_another_process(remote: Opener, folder: Path, method: str) -> None:
    stream = remote(prefetch=3)
    batches = stream.batches(0, GLOBAL)
    first = [next(batches)["input_ids"][:, 0].tolist() for _ in range(3)]  # threads are at work now
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=_first_batches, args=(stream, results), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    found = pickle.loads(results.get())
    assert found == [batch["input_ids"][:, 0].tolist() for batch in islice(local(folder).batches(0, GLOBAL), 20)]
    assert found[:3] == first


def test_each_shard_is_read_by_one_rank(remote: Opener, server: FaultServer, folder: Path) -> None:
    by_rank = []
    for rank in (0, 1):
        server.downloads.clear()
        list(islice(remote(cache=f"host-{rank}", prefetch=0).batches(0, GLOBAL, rank, 2), BLOCKS // GLOBAL))
        by_rank.append(server.counts())
    plain = local(folder)
    files = {shard_at(plain, sample) for sample in range(BLOCKS // GLOBAL * GLOBAL)}
    everything = by_rank[0] + by_rank[1]
    assert set(everything) == {f"/train/{file}" for file in files} | {
        f"/scores/{EXPECTED.digest}/train/{file}" for file in files
    }
    assert set(everything.values()) == {1}


def _read_all(stream: BlockStream, rank: int, workers: int) -> None:
    for _ in islice(stream.batches(0, GLOBAL, rank, 2, workers), 40):
        pass


def test_the_ranks_and_workers_of_a_host_share_its_cache(remote: Opener, server: FaultServer, folder: Path) -> None:
    shards = len(load_manifest(folder).splits["train"].shards)
    stream = remote()
    server.delay = 0.05  # so that all of them want the same file at the same time
    processes = [
        multiprocessing.Process(target=_read_all, args=(stream, rank, workers))
        for rank, workers in ((0, 2), (1, 0), (1, 0))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert set(server.counts().values()) == {1}
    assert len(server.counts()) == 2 * shards


def test_what_is_read_next_is_fetched_before_within_bounds(remote: Opener, server: FaultServer) -> None:
    stream = remote(prefetch=3)
    batches = stream.batches(0, GLOBAL)
    for _ in range(2):
        next(batches)
    needed = {shard_at(stream, sample) for sample in range(GLOBAL)}
    deadline = time.monotonic() + 20

    def ahead() -> set[str]:
        paths = [path.rsplit("/", 1)[1] for path in server.counts() if "/scores/" not in path]
        return set(paths) - needed

    while len(ahead()) < 3:
        assert time.monotonic() < deadline, "nothing was fetched ahead"
        time.sleep(0.02)
    time.sleep(0.5)
    # Rows of the first shard of each lane last for three rounds; the next ones are of the lanes' second shards.
    assert ahead() <= {shard_at(stream, sample) for sample in range(3 * LANES, 6 * LANES)}
    assert len(ahead()) == 3
    server.downloads.clear()
    batches = remote(cache="other", prefetch=0).batches(0, GLOBAL)
    for _ in range(2):
        next(batches)
    time.sleep(0.3)
    assert ahead() == set()


@pytest.mark.parametrize("shards", [0.5, 4])
def test_a_cache_smaller_than_the_data_gives_the_same_batches(
    remote: Opener, folder: Path, tmp_path: Path, shards: float
) -> None:
    size = max(shard.bytes for shard in load_manifest(folder).splits["train"].shards)
    stream = remote(cache_gib=shards * size / 2**30)
    assert_same(stream.batches(0, GLOBAL), local(folder).batches(0, GLOBAL), 25)
    objects = [path for path in (tmp_path / "cache" / "objects").iterdir() if path.name != "lock"]
    assert sum(path.stat().st_size for path in objects) <= max(shards, 1.5) * size


@pytest.mark.parametrize("fault", ["500", "truncated", "gone", pytest.param("slow", marks=pytest.mark.slow)])
def test_faults_on_the_way_change_nothing(at_s3: tuple[Opener, FaultServer], folder: Path, fault: str) -> None:
    stream, server = at_s3[0](), at_s3[1]
    for number in range(4):
        server.spoil(shard_at(stream, 9 * number), fault, times=2)
    server.spoil("/scores/", fault, times=2)
    assert_same(stream.batches(0, GLOBAL), local(folder).batches(0, GLOBAL), 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_in_mid_epoch_ends_the_reading_with_its_name(
    remote: Opener, server: FaultServer, workers: int
) -> None:
    stream = remote(prefetch=0)
    lost = next(
        file
        for file in (shard_at(stream, sample) for sample in range(40, 50))
        if file not in {shard_at(stream, sample) for sample in range(4 * GLOBAL)}
    )
    server.spoil(lost, "gone")
    batches = stream.batches(0, GLOBAL, workers=workers)
    for _ in range(3):
        next(batches)  # what does not need the shard is read
    with pytest.raises(BadShardError) as caught:
        list(batches)
    line = str(caught.value)
    assert line.startswith(f"{server.url}/train/{lost}: given up after 4 attempts in ")
    assert line.endswith("there is no such object")


@pytest.mark.parametrize(("fault", "workers"), [("gone", 0), ("gone", 2), ("flipped", 0)])
def test_bad_shards_are_skipped_without_a_change_of_order(
    remote: Opener, server: FaultServer, fault: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    stream = remote(on_bad_shard="skip", attempts=2)
    assert isinstance(server.upstream, Path)
    lost, unscored = shard_at(stream, 40), shard_at(stream, 3)
    server.spoil(f"train/{lost}", fault)
    server.spoil(f"/{unscored}", fault)  # the same name, and that of its losses
    skipped = 0
    plain = local(server.upstream)
    for number, (batch, expected) in enumerate(
        zip(stream.batches(0, GLOBAL, workers=workers), islice(plain.batches(0, GLOBAL), 24), strict=False)
    ):
        files = [shard_at(stream, GLOBAL * number + row) for row in range(GLOBAL)]
        bad = torch.tensor([file in (lost, unscored) for file in files])
        assert batch[SKIPPED].tolist() == bad.long()[:, None].tolist()
        for key, tensor in expected.items():
            assert torch.equal(batch[key][~bad], tensor[~bad])
            assert batch[key].shape == tensor.shape
            assert batch[key].dtype == tensor.dtype
        assert (batch["labels"][bad] == -100).all()
        assert (batch["reference_loss"][bad] == 0).all()
        skipped += int(bad.sum())
    assert skipped >= 12, "two epochs pass each bad shard twice"
    if not workers:
        told = [record.getMessage() for record in caplog.records if "are skipped" in record.getMessage()]
        assert len(told) == 2, "each bad shard is told once"
        assert any(f"the 3 blocks of train/{lost} are skipped" in line for line in told)


def test_a_remote_that_cannot_be_reached_is_no_bad_shard(remote: Opener, server: FaultServer) -> None:
    stream = remote(on_bad_shard="skip", attempts=2)
    server.spoil(shard_at(stream, 3), "500")
    with pytest.raises(DataError, match="given up after 2 attempts"):
        next(stream.batches(0, GLOBAL))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_local_shards_are_skipped_by_whoever_reads_them(
    folder: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    plain = local(folder)
    missing, altered, unscored = (shard_at(plain, sample) for sample in (0, 1, 2))
    (copy / "train" / missing).unlink()
    for path in (copy / "train" / altered, score_path(scores_folder(copy, EXPECTED), "train", unscored)):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(BadShardError):
        local(copy)
    # Of two ranks one alone has hashed a shard at the start; both must come to the same batches.
    losses = {"on_bad_shard": "skip", "world_size": 2}
    streams = [
        DataFolder(copy).open(
            "train",
            seed=3,
            on_bad_shard="skip",
            verify_rank=rank,
            verify_world_size=2,
            losses=StoredLosses(DataFolder(copy), "train", EXPECTED, rank=rank, **losses),
        )
        for rank in (0, 1)
    ]
    assert missing in caplog.text
    assert_same(streams[0].batches(0, GLOBAL, workers=workers), streams[1].batches(0, GLOBAL), 24)
    bad = {missing, altered, unscored}
    for number, (batch, expected) in enumerate(
        zip(islice(streams[0].batches(0, GLOBAL), 24), plain.batches(0, GLOBAL), strict=False)
    ):
        marks = [shard_at(plain, GLOBAL * number + row) in bad for row in range(GLOBAL)]
        assert batch[SKIPPED].flatten().tolist() == marks
        for key, tensor in expected.items():
            assert torch.equal(batch[key][~torch.tensor(marks)], tensor[~torch.tensor(marks)])


def test_a_web_server_will_do(folder: Path, tmp_path: Path, small_corpus: dict[str, Any]) -> None:
    with fault_server(folder) as server:
        location = RemoteFolder(server.url, stream_config(tmp_path / "cache"))
        stream = DataFolder(location).open(
            "train", seed=3, losses=StoredLosses(DataFolder(location), "train", EXPECTED)
        )
        assert_same(stream.batches(0, GLOBAL), local(folder).batches(0, GLOBAL), 12)
    with fault_server(Path(small_corpus["dir"])) as server:
        location = RemoteFolder(server.url, stream_config(tmp_path / "cache"))
        manifest = load_manifest(location)
        tokenizer = load_data_tokenizer(location, manifest)
        assert (
            tokenizer("We the people")["input_ids"]
            == load_data_tokenizer(small_corpus["dir"], manifest)("We the people")["input_ids"]
        )
        server.downloads.clear()
        load_data_tokenizer(location, manifest)
        assert server.downloads == [], "the tokenizer is fetched once per host"
        other = manifest.model_copy(update={"tokenizer_fingerprint": "another"})
        with pytest.raises(DataError, match="not the tokenizer that the manifest names"):
            load_data_tokenizer(location, other)


def test_a_tokenizer_comes_from_s3(s3: str, tmp_path: Path, small_corpus: dict[str, Any]) -> None:
    corpus = Path(small_corpus["dir"])
    shutil.copytree(corpus / "tokenizer", tmp_path / "part" / "tokenizer")
    shutil.copy(corpus / "manifest.json", tmp_path / "part")
    address = upload(tmp_path / "part", s3, "corpus")
    location = RemoteFolder(address, stream_config(tmp_path / "cache", s3))
    manifest = load_manifest(location)
    assert (
        load_data_tokenizer(location, manifest).get_vocab()
        == load_data_tokenizer(small_corpus["dir"], manifest).get_vocab()
    )


def test_an_address_without_data_is_told_at_once(at_s3: tuple[Opener, FaultServer], tmp_path: Path) -> None:
    location = location_of("s3://bucket/nothing", stream_config(tmp_path, at_s3[1].url))
    with pytest.raises(DataError, match=r"s3://bucket/nothing/manifest\.json: missing.*dualtok prepare"):
        load_manifest(location)
    assert len(at_s3[1].downloads) == 1


def test_missing_scores_at_an_address_are_told_apart(uploaded: str, s3: str, tmp_path: Path) -> None:
    location = RemoteFolder(uploaded, stream_config(tmp_path, s3))
    manifest = load_manifest(location)
    with pytest.raises(DataError, match=r"those of models/reference differ in: weights\); run `dualtok score`"):
        StoredLosses(DataFolder(location, manifest), "train", Fingerprint("other", "tokenizer", "blocks", "fp32"))
    unfinished = Fingerprint("unfinished", "tokenizer", "blocks", "fp32")
    (tmp_path / "x.arrow").write_bytes(b"x")
    location.storage.put(tmp_path / "x.arrow", f"scores/{unfinished.digest}/train/x.arrow")
    with pytest.raises(DataError, match="scoring did not finish"):
        StoredLosses(DataFolder(location, manifest), "train", unfinished)


def test_ranks_of_uneven_shards_read_equally_often(remote: Opener) -> None:
    """Lanes are of unequal length, and neither ranks nor micro-batch divide them."""
    stream = remote()
    ranks = [islice(stream.batches(0, 9, rank, 3), 25) for rank in range(3)]
    shapes = [[batch["input_ids"].shape for batch in batches] for batches in ranks]
    assert shapes[0] == shapes[1] == shapes[2] == [torch.Size([3, BLOCK_LENGTH])] * 25


def test_a_mixture_takes_folders_and_addresses(remote: Opener, folder: Path, server: FaultServer) -> None:
    plain = [DataFolder(folder).open("train", seed=3), DataFolder(folder).open("train", seed=4)]
    at_address = DataFolder(remote(prefetch=2)._reader._location).open("train", seed=4)
    mixed, expected = (Mixture(pair, [0.6, 0.4], seed=1) for pair in ([plain[0], at_address], plain))
    assert_same(mixed.batches(0, GLOBAL), expected.batches(0, GLOBAL), 30)
    config = DataConfig(dir="local", mix=(MixConfig(dir="s3://bucket/x", weight=0.5),), stream=stream_config(folder))
    assert config.mix[0].dir == "s3://bucket/x"


def test_a_manifest_leads_nowhere_else(folder: Path) -> None:
    values = load_manifest(folder).model_dump()
    for part, value in {"file": "../other.arrow", "sha256": "../../etc/passwd"}.items():
        changed = {**values["splits"]["train"]["shards"][0], part: value}
        split = {**values["splits"]["train"], "shards": [changed]}
        with pytest.raises(ValueError, match=part):
            Manifest.model_validate({**values, "splits": {"train": split}})
