"""How well the stream mixes, beside a uniform permutation of the same blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualtok.data.folder import DataFolder
from tests.data.support import whole_documents, write_prepared

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS, LANES, ROWS, BATCH = 4096, 16, 32, 64
SOURCE = range(1024, 1536)
"""Neighboring blocks of the file order, as of one of eight sources that were prepared one after the other."""
SEEDS = range(6)


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Return one epoch for each seed, as places in the order in which blocks were prepared."""
    folder = write_prepared(
        tmp_path_factory.mktemp("shuffle") / "prepared", whole_documents(BLOCKS), lanes=LANES, rows_per_shard=ROWS
    )
    found = []
    for seed in SEEDS:
        stream = DataFolder(folder).open("train", seed=seed, verify=False)
        found.append(stream.read(range(BLOCKS))["input_ids"][:, 0].numpy() - 1)
    return found


def uniform() -> list[np.ndarray]:
    return [np.random.default_rng(seed).permutation(BLOCKS) for seed in range(100, 100 + len(SEEDS))]


def correlations(orders: list[np.ndarray]) -> np.ndarray:
    """Correlation between the place in the stream and the place in the files."""
    return np.array([np.corrcoef(np.arange(BLOCKS), order)[0, 1] for order in orders])


def spread(orders: list[np.ndarray], batch: int = BATCH) -> float:
    """Variance of a source's blocks per batch, over the variance of drawing each batch at random from all blocks."""
    share = len(SOURCE) / BLOCKS
    expected = batch * share * (1 - share) * (BLOCKS - batch) / (BLOCKS - 1)
    counts = [np.isin(order, SOURCE).reshape(-1, batch).sum(axis=1) for order in orders]
    return float(np.mean([np.mean((count - batch * share) ** 2) for count in counts]) / expected)


def neighbors(orders: list[np.ndarray]) -> float:
    """Share of following blocks of a batch that lay within one round of lanes of each other in the files."""
    near = [np.abs(np.diff(order.reshape(-1, BATCH), axis=1)) <= LANES for order in orders]
    return float(np.mean(near))


def test_the_order_of_the_files_does_not_show(orders: list[np.ndarray]) -> None:
    # The standard error of one permutation's correlation is 1 / sqrt(4095) = .016. Whole shards move together, so that
    # the stream's is as if so many shards per lane were permuted: 16 lanes of 8 shards, 1 / sqrt(16 * 7) = .094.
    assert np.abs(correlations(uniform())).max() < 0.06
    assert np.abs(correlations(orders)).max() < 0.3
    assert abs(correlations(orders).mean()) < 0.12
    assert np.corrcoef(np.arange(BLOCKS), np.arange(BLOCKS))[0, 1] == pytest.approx(1), "unshuffled it would be 1"


def test_a_source_is_spread_over_the_batches(orders: list[np.ndarray]) -> None:
    assert 0.8 < spread(uniform()) < 1.25
    assert spread([np.arange(BLOCKS)]) > 50
    # A batch has batch / lanes rows of each lane's current shard. Here a source fills whole shards, and so many of its
    # blocks come as one: the variance is so many times that of single blocks. A batch of one row per lane has none.
    for batch in (LANES, 2 * LANES, BATCH):
        assert spread(orders, batch) < 1.3 * batch / LANES


def test_within_the_window_blocks_mix_as_by_a_permutation(tmp_path: Path) -> None:
    """The window is the lanes' current shards: here it is the whole split."""
    folder = write_prepared(tmp_path, whole_documents(BLOCKS), lanes=LANES, rows_per_shard=BLOCKS // LANES)
    streams = [DataFolder(folder).open("train", seed=seed, verify=False) for seed in SEEDS]
    orders = [stream.read(range(BLOCKS))["input_ids"][:, 0].numpy() - 1 for stream in streams]
    assert 0.8 < spread(orders) < 1.25
    assert np.abs(correlations(orders)).max() < 0.06


def test_neighbors_in_the_files_are_not_neighbors_in_a_batch(orders: list[np.ndarray]) -> None:
    chance = neighbors(uniform())
    assert chance < 0.02
    assert neighbors([np.arange(BLOCKS)]) == 1.0
    assert neighbors(orders) < 3 * chance + 0.01
