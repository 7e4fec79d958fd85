"""A prepared folder as its readers take it: where it lies, its manifest, its tokenizer, and the ids that it holds."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dualtok.data.manifest import load_manifest
from dualtok.data.remote.remote import place_of
from dualtok.data.stream.blocks import BlockStream
from dualtok.data.tokenizer import load_data_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.data.manifest import Manifest
    from dualtok.data.packing import Segment
    from dualtok.data.remote.remote import Place

READ_AT_ONCE = 256


class HeldId(NamedTuple):
    """A token id, and a document that holds it."""

    id: int
    document: int
    split: str


class DataFolder:
    """Prepared data, local or at an address; its parts are read when they are asked for, once.

    Args:
        place: the prepared folder, or its address.
        manifest: its manifest, where it has been read already.

    Raises:
        DataError: the folder is not prepared.
    """

    def __init__(self, place: str | Place, manifest: Manifest | None = None) -> None:
        self.place = place_of(place)
        self.manifest = load_manifest(self.place) if manifest is None else manifest

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the blocks."""
        return load_data_tokenizer(self.place, self.manifest)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id that a block holds.

        A folder of an earlier version does not tell it, and is read through where the tokenizer alone cannot.
        """
        known = [entry.largest_id for entry in self.manifest.splits.values()]
        if all(largest is not None for largest in known):
            return max((largest for largest in known if largest is not None), default=0)
        return max((int(np.max(found)) for _, found, _ in self._ids()), default=0)

    def holds(self, at_least: int) -> HeldId | None:
        """Return a token id of the blocks that is not below ``at_least``, with its document; None if there is none."""
        if at_least >= vocabulary_size(self.tokenizer) or at_least > self.largest_id:
            return None
        for split, row, pieces in self._ids():
            if len(where := np.flatnonzero(row >= at_least)):
                ends = np.cumsum([piece.length for piece in pieces])
                return HeldId(int(row[where[0]]), pieces[int(np.searchsorted(ends, where[0], "right"))].doc, split)
        return None

    def _ids(self) -> Iterator[tuple[str, NDArray[np.int64], list[Segment]]]:
        """Yield split, token ids and pieces of each block; padding, at its end, is not among the ids."""
        for split, entry in self.manifest.splits.items():
            if not entry.blocks:
                continue
            for batch, pieces in BlockStream(self.place, split, seed=0, verify=False).sequential(READ_AT_ONCE):
                for row, own in zip(batch["input_ids"].numpy(), pieces, strict=True):
                    if own:  # a batch is filled up with rows of none
                        yield split, row[: sum(piece.length for piece in own)], own
