"""Folds of documents: even, the same everywhere, and left out of what is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualtok.data.folds import LeaveOut, fold_of
from dualtok.data.manifest import load_manifest
from dualtok.data.stream import BlockStream
from dualtok.objective.head import IGNORED_LABEL


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_are_even_whatever_the_order_of_ids(folds: int) -> None:
    for ids in (np.arange(60_000), np.arange(0, 600_000, 10), np.arange(60_000) * 2**20):
        shares = np.bincount(fold_of(ids, folds), minlength=folds) / len(ids)
        # Five standard deviations of a binomial share.
        assert np.abs(shares - 1 / folds).max() < 5 * np.sqrt((1 / folds) * (1 - 1 / folds) / len(ids))


def test_neighbours_fall_into_folds_independently() -> None:
    fold = fold_of(np.arange(100_000), 2)
    assert abs(np.mean(fold[1:] == fold[:-1]) - 0.5) < 0.01


def test_the_folds_of_ids_never_change() -> None:
    assert fold_of([0, 1, 2, 3, 4, 5, 6, 7, 10**12], 5).tolist() == [0, 0, 0, 3, 3, 3, 2, 2, 4]


def test_every_document_is_left_out_once(small_corpus: dict[str, Any]) -> None:
    whole = BlockStream(small_corpus["dir"], "train", seed=1)
    learned = {}
    for fold in range(3):
        stream = BlockStream(small_corpus["dir"], "train", seed=1, leave_out=LeaveOut(fold=fold, folds=3))
        for shard in load_manifest(small_corpus["dir"]).splits["train"].shards:
            rows = np.arange(shard.rows)
            everything, some = whole.read_rows(shard.file, rows), stream.read_rows(shard.file, rows)
            assert (everything["input_ids"] == some["input_ids"]).all()
            for row, pieces in enumerate(whole.pieces(shard.file, rows)):
                column = 0
                for piece in pieces:
                    here = (row, slice(column, column + piece.length))
                    column += piece.length
                    kept = some["labels"][here] != IGNORED_LABEL
                    if fold_of([piece.doc], 3)[0] == fold:
                        assert not kept.any()
                    else:
                        assert (some["labels"][here] == everything["labels"][here]).all()
                        learned[piece.doc] = learned.get(piece.doc, set()) | {fold}
    assert {len(folds) for folds in learned.values()} == {2}


def test_a_fold_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leave_out.fold: 2 of 2 folds"):
        LeaveOut(fold=2, folds=2)
