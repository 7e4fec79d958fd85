"""Folds of documents: even, the same everywhere, and left out of what is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualtok.config.folds import LeaveOut
from dualtok.data.folder import DataFolder
from dualtok.data.folds import fold_of, in_shadow
from dualtok.data.manifest import load_manifest
from dualtok.objective.head import IGNORED_LABEL


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_are_even_whatever_the_order_of_ids(folds: int) -> None:
    for ids in (np.arange(60_000), np.arange(0, 600_000, 10), np.arange(60_000) * 2**20):
        shares = np.bincount(fold_of(ids, folds), minlength=folds) / len(ids)
        # Five standard deviations of a binomial share.
        assert np.abs(shares - 1 / folds).max() < 5 * np.sqrt((1 / folds) * (1 - 1 / folds) / len(ids))


def test_neighbors_fall_into_folds_independently() -> None:
    fold = fold_of(np.arange(100_000), 2)
    assert abs(np.mean(fold[1:] == fold[:-1]) - 0.5) < 0.01


def test_the_folds_of_ids_never_change() -> None:
    assert fold_of([0, 1, 2, 3, 4, 5, 6, 7, 10**12], 5).tolist() == [0, 0, 0, 3, 3, 3, 2, 2, 4]


def test_every_document_is_left_out_once(small_corpus: dict[str, Any]) -> None:
    whole = DataFolder(small_corpus["dir"]).open("train", seed=1)
    learned = {}
    for fold in range(3):
        stream = DataFolder(small_corpus["dir"]).open("train", seed=1, leave_out=LeaveOut(fold=fold, folds=3))
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


def test_every_document_is_in_half_of_the_shadows() -> None:
    ids = np.concatenate([np.arange(3000), np.arange(10**9, 10**9 + 3000)])
    inside = np.stack([in_shadow(ids, shadow, 7) for shadow in range(10)])
    assert (inside.sum(0) == 5).all()
    spread = np.sqrt(0.25 / len(ids))
    assert np.abs(inside.mean(1) - 0.5).max() < 5 * spread
    # Shadows of different pairs are drawn independently of each other, and of the seed's other draws.
    for one in range(0, 10, 2):
        for other in range(one + 2, 10):
            assert abs((inside[one] == inside[other]).mean() - 0.5) < 5 * spread
    assert abs((inside[0] == in_shadow(ids, 0, 8)).mean() - 0.5) < 5 * spread


def test_the_shadows_of_ids_never_change() -> None:
    ids = [0, 1, 2, 3, 4, 5, 6, 7, 10**12]
    assert "".join("01"[int(inside)] for inside in in_shadow(ids, 3, 42)) == "001000111"
    assert (in_shadow(ids, 2, 42) != in_shadow(ids, 3, 42)).all()
    assert in_shadow(ids[3:5], 3, 42).tolist() == in_shadow(ids, 3, 42)[3:5].tolist()
