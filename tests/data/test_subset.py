"""Some documents of a prepared folder as a folder of their own: all of theirs, and nothing of the others."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.subset import Subset, is_written, write_subset
from dualtok.data.tokenizer import fingerprint, load_data_tokenizer
from dualtok.errors import DataError
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def even(documents: NDArray[np.int64]) -> NDArray[np.bool_]:
    return documents % 2 == 0


def learned(folder: str | Path, split: str) -> dict[int, dict[int, tuple[list[int], list[int]]]]:
    """Return document -> start of each piece -> its token ids and labels."""
    stream = DataFolder(folder).open(split)
    found: dict[int, dict[int, tuple[list[int], list[int]]]] = defaultdict(dict)
    for batch, segments in stream.sequential(4):
        for row, pieces in enumerate(segments):
            column = 0
            for document, start, length in pieces:
                here = slice(column, column + length)
                found[document][start] = (batch["input_ids"][row, here].tolist(), batch["labels"][row, here].tolist())
                column += length
            if pieces:
                assert (batch["labels"][row, column:] == IGNORED_LABEL).all()
    return found


def test_a_subset_holds_its_documents_and_no_token_of_the_others(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    source, target = Path(small_corpus["dir"]), tmp_path / "half"
    both = learned(source, "train") | learned(source, "held_out")
    wanted = {document: pieces for document, pieces in both.items() if document % 2 == 0}
    assert 0 < len(wanted) < len(both)
    subsets = {
        "train": Subset(("train", "held_out"), even),
        "validation": Subset(("validation",), lambda ids: ids > -1),
    }
    made = write_subset(DataFolder(source), target, subsets, rows_per_shard=20, note={"shadow": 3})
    assert learned(target, "train") == wanted
    assert learned(target, "validation") == learned(source, "validation")

    assert load_manifest(target) == made
    assert made.config["shadow"] == 3
    before, entry = load_manifest(source), made.splits["train"]
    assert set(made.splits) == {"train", "validation"}
    assert (made.lanes, made.block_length) == (before.lanes, before.block_length)
    assert fingerprint(load_data_tokenizer(target, made)) == before.tokenizer_fingerprint
    assert max(shard.rows for shard in entry.shards) <= 20
    pieces = [piece for document in wanted.values() for piece in document.values()]
    assert entry.documents == len(wanted)
    assert entry.tokens == sum(len(ids) for ids, _ in pieces)
    assert entry.predicted_tokens == sum(label != IGNORED_LABEL for _, labels in pieces for label in labels)
    table = DataFolder(target).documents("train")
    original = {
        row["doc"]: row for split in ("train", "held_out") for row in DataFolder(source).documents(split).to_pylist()
    }
    assert {row["doc"]: row for row in table.to_pylist()} == {document: original[document] for document in wanted}


def test_an_empty_subset_is_refused_and_leaves_no_manifest(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    nothing = {"train": Subset(("train",), lambda ids: ids < 0)}
    with pytest.raises(DataError, match="too few documents in train"):
        write_subset(DataFolder(small_corpus["dir"]), tmp_path / "none", nothing, rows_per_shard=20, note={})
    assert not is_written(tmp_path / "none")
