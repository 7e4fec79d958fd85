"""Several folders as one stream: exact shares, each source once per epoch, and an order that only the seed decides."""

from __future__ import annotations

import pickle
import sys
from collections import Counter, defaultdict
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dualtok.config.data import MIX_PERIOD, DataConfig, MixConfig
from dualtok.config.load import parse_run
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import MANIFEST, load_manifest, save_manifest
from dualtok.data.mixed import load_sources
from dualtok.data.stream.mixture import Mixture, quotas
from dualtok.errors import ConfigError, DataError
from tests.data.support import BLOCK_LENGTH, whole_documents, write_prepared

if TYPE_CHECKING:
    from pathlib import Path

LANES, GLOBAL = 4, 8
SIZES = (61, 30, 9)
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return three prepared folders of 61, 30 and 9 blocks; a block of the second holds the tokens 1001, 1002, ..."""
    root = tmp_path_factory.mktemp("mixture")
    return [
        write_prepared(
            root / name,
            [(doc, ids + 1000 * number) for doc, ids in whole_documents(blocks)],
            lanes=LANES,
            rows_per_shard=3,
        )
        for number, (name, blocks) in enumerate(zip("abc", SIZES, strict=True))
    ]


def mixture(folders: list[Path], seed: int = 3) -> Mixture:
    return Mixture(
        [DataFolder(folder).open("train", seed=seed, verify=False) for folder in folders], WEIGHTS, seed=seed
    )


def data_section(folders: list[Path]) -> DataConfig:
    mix = tuple(MixConfig(str(folder), weight) for folder, weight in zip(folders[1:], WEIGHTS[1:], strict=True))
    return DataConfig(str(folders[0]), mix=mix)


def tokens(batch: dict[str, torch.Tensor]) -> list[int]:
    """Return which blocks a batch holds: 1000 times the source, plus the block and 1."""
    assert (batch["input_ids"] == batch["input_ids"][:, :1]).all()
    return batch["input_ids"][:, 0].tolist()


def test_each_lane_keeps_the_shares_exactly_in_every_period(folders: list[Path]) -> None:
    stream = mixture(folders)
    patterns = set()
    for period in (0, 1, 7):
        for lane in range(LANES):
            first = period * MIX_PERIOD * LANES + lane
            chosen = [stream.locate(sample)[0] for sample in range(first, first + MIX_PERIOD * LANES, LANES)]
            assert Counter(chosen) == {0: 500, 1: 300, 2: 200}
            patterns.add(tuple(chosen))
    assert len(patterns) == 3 * LANES, "lanes or periods repeat each other"


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=8))
def test_quotas_round_by_less_than_one_sample_and_fill_the_period(raw: list[float]) -> None:
    weights = [value / sum(raw) for value in raw]
    found = quotas(weights)
    assert sum(found) == MIX_PERIOD
    assert all(abs(count - MIX_PERIOD * weight) < 1 + 1e-6 for count, weight in zip(found, weights, strict=True))


def test_the_largest_remainders_are_rounded_up() -> None:
    assert quotas([1 / 3, 1 / 3, 1 / 3]) == (334, 333, 333)
    assert quotas([0.4992, 0.2506, 0.2502]) == (499, 251, 250)
    assert quotas([1 - 0.1 - 0.57, 0.1, 0.57]) == (330, 100, 570)


def test_each_block_of_a_source_comes_once_per_epoch_of_its_lane(folders: list[Path]) -> None:
    stream = mixture(folders)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for sample, token in enumerate(tokens(stream.read(range(1200)))):
        source, block = divmod(token - 1, 1000)
        assert block % LANES == sample % LANES, "a lane read another lane's shard"
        seen[source, sample % LANES].append(block)
    for (source, lane), blocks in seen.items():
        everything = list(range(lane, SIZES[source], LANES))
        epochs = [blocks[first : first + len(everything)] for first in range(0, len(blocks), len(everything))]
        assert len(epochs) > 3
        assert all(sorted(epoch) == everything for epoch in epochs[:-1])
        assert len(everything) < 8 or len({tuple(epoch) for epoch in epochs[:-1]}) == len(epochs) - 1, "same order"
    assert len(seen) == 3 * LANES


def test_positions_go_on_from_one_period_to_the_next(folders: list[Path]) -> None:
    stream = mixture(folders)
    positions: dict[int, int] = defaultdict(int)
    for sample in range(1, 3 * MIX_PERIOD * LANES, LANES):
        source, own = stream.locate(sample)
        epoch, index = divmod(own, SIZES[source])
        in_lane = len(range(1, SIZES[source], LANES))
        assert epoch * in_lane + index // LANES == positions[source]
        positions[source] += 1


def test_the_order_never_changes_by_accident(folders: list[Path]) -> None:
    """A changed order would continue every interrupted run on other samples than it began with."""
    assert [mixture(folders).locate(sample) for sample in range(32)] == GOLDEN
    assert [mixture(folders, seed=4).locate(sample) for sample in range(32)] != GOLDEN


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_same_global_micro_batches(folders: list[Path], world_size: int) -> None:
    steps = 60
    whole = tokens(mixture(folders).read(range(steps * GLOBAL)))
    ranks = [list(islice(mixture(folders).batches(0, GLOBAL, rank, world_size), steps)) for rank in range(world_size)]
    for step in range(steps):
        slices = [tokens(batches[step]) for batches in ranks]
        assert {len(part) for part in slices} == {GLOBAL // world_size}
        assert list(chain.from_iterable(slices)) == whole[step * GLOBAL : (step + 1) * GLOBAL]


def test_each_shard_is_read_by_one_rank(folders: list[Path]) -> None:
    readers: dict[int, set[int]] = defaultdict(set)
    for rank in range(2):
        for batch in islice(mixture(folders).batches(0, LANES, rank, 2), 300):
            for token in tokens(batch):
                readers[token].add(rank)
    assert len(readers) == sum(SIZES)
    assert {len(ranks) for ranks in readers.values()} == {1}


@pytest.mark.parametrize("start", [8, 64, 8 * 997])
def test_a_resumed_mixture_is_the_tail_of_the_whole(folders: list[Path], start: int) -> None:
    whole = islice(mixture(folders).batches(0, GLOBAL, 1, 2), start // GLOBAL, start // GLOBAL + 20)
    resumed = islice(mixture(folders).batches(start, GLOBAL, 1, 2), 20)
    assert [tokens(batch) for batch in resumed] == [tokens(batch) for batch in whole]


def test_data_workers_change_neither_batches_nor_order(folders: list[Path]) -> None:
    stream = mixture(folders)
    plain = list(islice(stream.batches(8, 4, 1, 2), 20))
    for workers in (1, 2):
        batches = list(islice(stream.batches(8, 4, 1, 2, workers=workers), 20))
        for batch, expected in zip(batches, plain, strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert tokens(pickle.loads(pickle.dumps(stream)).read(range(40))) == tokens(stream.read(range(40)))


def test_a_seek_costs_the_same_wherever_it_goes(folders: list[Path]) -> None:
    def calls(sample: int) -> int:
        """Return the function calls of reading a sample whose pattern and permutations were not drawn before."""
        count = 0

        def seen(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        stream = mixture(folders, seed=1000 * sample)
        sys.setprofile(seen)
        try:
            stream.read([sample])
        finally:
            sys.setprofile(None)
        return count

    calls(3)
    assert 100 < calls(10**7) <= 1.2 * calls(10)


def test_reference_losses_come_from_their_own_source(folders: list[Path]) -> None:
    class Scores:
        def __init__(self, number: int) -> None:
            self.number = number

        def read(self, shard_stem: str, rows: np.ndarray) -> np.ndarray:
            lane = int(shard_stem.split("-")[1])
            return np.full((len(rows), BLOCK_LENGTH), 100.0 * self.number + lane, np.float32)

    streams = [DataFolder(folder).open("train", seed=3, losses=Scores(i)) for i, folder in enumerate(folders)]
    stream = Mixture(streams, WEIGHTS, seed=3)
    batch = stream.read(range(64))
    for sample, row in enumerate(batch["reference_loss"]):
        source = stream.locate(sample)[0]
        assert row.tolist() == [100.0 * source + sample % LANES] * (BLOCK_LENGTH - 1) + [0.0]
    assert {source for source, _ in map(stream.locate, range(64))} == {0, 1, 2}


def test_evaluations_read_the_main_folder_alone(folders: list[Path]) -> None:
    stream = mixture(folders)
    read = [token for batch, rows in stream.sequential(4, max_blocks=20) for token in tokens(batch) if rows]
    assert len(read) == 20
    assert max(read) <= SIZES[0]


def test_sources_are_loaded_with_the_main_one_first(folders: list[Path]) -> None:
    sources = load_sources(data_section(folders), "train")
    assert [source.dir for source in sources] == list(map(str, folders))
    assert [source.weight for source in sources] == pytest.approx(WEIGHTS)
    assert [source.manifest.splits["train"].blocks for source in sources] == list(SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_fingerprint": "other"}, r"b was prepared with tokenizer fingerprint other, but .*a with none"),
        ({"block_length": 16}, r"b was prepared with block length 16, but .*a with 8; .*data\.block_length=8"),
        ({"lanes": 2}, r"b was prepared with lanes 2, but .*a with 4; .*data\.lanes=4"),
    ],
)
def test_a_folder_prepared_otherwise_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folders = [write_prepared(tmp_path / name, whole_documents(8), lanes=4, rows_per_shard=3) for name in "ab"]
    save_manifest(load_manifest(folders[1]).model_copy(update=change), folders[1])
    with pytest.raises(DataError, match=message):
        load_sources(DataConfig(str(folders[0]), mix=(MixConfig(str(folders[1]), 0.1),)), "train")


def test_a_folder_without_the_split_or_with_fewer_blocks_than_lanes_is_refused(tmp_path: Path) -> None:
    large, small = (
        write_prepared(tmp_path / str(blocks), whole_documents(blocks), lanes=4, rows_per_shard=3) for blocks in (9, 3)
    )
    with pytest.raises(DataError, match=r"3: split 'train' has 3 blocks in 4 lanes.*fewer data\.lanes"):
        load_sources(DataConfig(str(large), mix=(MixConfig(str(small), 0.1),)), "train")
    with pytest.raises(DataError, match=r"3: split 'train' has 3 blocks in 4 lanes"):
        load_sources(DataConfig(str(small), mix=(MixConfig(str(large), 0.1),)), "train")
    load_sources(DataConfig(str(small)), "train")  # without a mix more lanes than blocks do no harm
    with pytest.raises(DataError, match=r"3: prepared without split 'reference'"):
        load_sources(DataConfig(str(small), mix=(MixConfig(str(large), 0.1),)), "reference")
    (large / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"9/manifest\.json: missing"):
        load_sources(DataConfig(str(small), mix=(MixConfig(str(large), 0.1),)), "train")


def test_weights_and_folders_are_checked() -> None:
    with pytest.raises(ValidationError, match=r"data\.mix: the weights sum to 1, which leaves less than 0\.001"):
        DataConfig("a", mix=(MixConfig("b", 0.5), MixConfig("c", 0.5)))
    DataConfig("a", mix=(MixConfig("b", 0.499), MixConfig("c", 0.5)))
    for repeated in ("a/", "b"):
        with pytest.raises(ValidationError, match=r"data\.mix: .* is there twice"):
            DataConfig("a", mix=(MixConfig("b", 0.1), MixConfig(repeated, 0.1)))
    for weight in (0.0009, 1.0, -0.1):
        with pytest.raises(ConfigError, match=r"data\.mix\.0\.weight: Input should be"):
            parse_run({"data": {"dir": "a", "mix": [{"dir": "b", "weight": weight}]}})
    with pytest.raises(ConfigError, match=r"unknown key 'data\.mix\.0\.wait' \(did you mean 'weight'\?\)"):
        parse_run({"data": {"dir": "a", "mix": [{"dir": "b", "weight": 0.5, "wait": 1}]}})


def test_a_number_of_epochs_is_refused_with_a_mix() -> None:
    tree = {
        "data": {"dir": "a", "mix": [{"dir": "b", "weight": 0.2}]},
        "objective": "causal_lm",
        "train": {"learning_rate": 1e-3, "batch_size": 4, "epochs": 1},
    }
    with pytest.raises(ConfigError, match=r"train\.epochs: .*data\.mix.*train\.steps"):
        parse_run(tree)
    tree["train"] = {"learning_rate": 1e-3, "batch_size": 4, "steps": 1}
    parse_run(tree)


GOLDEN = [
    (2, 0),
    (2, 1),
    (0, 2),
    (0, 3),
    (0, 0),
    (1, 1),
    (2, 2),
    (0, 7),
    (1, 0),
    (1, 5),
    (1, 2),
    (0, 11),
    (0, 4),
    (1, 9),
    (1, 6),
    (0, 15),
    (0, 8),
    (0, 1),
    (2, 6),
    (0, 19),
    (2, 4),
    (2, 5),
    (1, 10),
    (0, 23),
    (0, 12),
    (0, 5),
    (0, 6),
    (0, 27),
    (0, 16),
    (1, 13),
    (0, 10),
    (0, 31),
]
"""(source, its own sample) of the first 32 samples."""
