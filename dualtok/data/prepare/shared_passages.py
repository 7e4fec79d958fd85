"""Whether non-members share passages with members: seen in preparation, while something can be done about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualtok.audit.statistics.passages import PASSAGE_CHARACTERS, Passages
from dualtok.data.manifest import DOCUMENTS
from dualtok.data.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dualtok.data.manifest import SplitEntry

MEMBERS, NON_MEMBERS = "train", "held_out"
"""Splits that an audit compares by default."""
TOKENS_AT_ONCE = 1 << 17
"""Tokens of non-members that are looked for in all members, and of members that are looked through at one time."""


def shared_with_members(folder: Path, splits: dict[str, SplitEntry]) -> float | None:
    """Return the share of non-members that have a passage of 200 characters in common with a member.

    Of conversations the tokens that are trained are compared, for many share their instructions. Pieces shorter than a
    passage are left out, and of a large split what lies beyond its first 131,072 tokens.

    Args:
        folder: the prepared folder.
        splits: its splits.

    Returns:
        None if there are no members or no non-members to compare.
    """
    if MEMBERS not in splits or NON_MEMBERS not in splits:
        return None
    length = _passage(folder / MEMBERS / DOCUMENTS)
    asked: list[NDArray[np.int64]] = []
    tokens = 0
    for piece in _pieces(folder / NON_MEMBERS, splits[NON_MEMBERS]):
        if tokens >= TOKENS_AT_ONCE:
            break
        tokens += len(piece)
        if len(piece) >= length:
            asked.append(piece)
    if not asked:
        return None
    passages = Passages(asked, length)
    for some in _portions(_pieces(folder / MEMBERS, splits[MEMBERS])):
        passages.find_in(some)
    return passages.share


def _portions(pieces: Iterator[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
    """Yield pieces together, some :data:`TOKENS_AT_ONCE` tokens of them at a time."""
    portion: list[NDArray[np.int64]] = []
    tokens = 0
    for piece in pieces:
        portion.append(piece)
        tokens += len(piece)
        if tokens >= TOKENS_AT_ONCE:
            yield portion
            portion, tokens = [], 0
    if portion:
        yield portion


def _passage(documents: Path) -> int:
    """Return about how many tokens a passage has."""
    with pa.memory_map(str(documents)) as source:
        table = pa.ipc.open_file(source).read_all()
        per_character = pc.sum(table["n_tokens"]).as_py() / max(1, pc.sum(table["n_characters"]).as_py())
    return max(1, round(PASSAGE_CHARACTERS * per_character))


def _pieces(folder: Path, entry: SplitEntry) -> Iterator[NDArray[np.int64]]:
    for shard in entry.shards:
        yield from _of_shard(folder / shard.file)


def _of_shard(path: Path) -> Iterator[NDArray[np.int64]]:
    shard = Shard(path)
    for row in range(len(shard)):
        ends, trained = np.cumsum(shard.lengths(row)), shard.trained(row)
        own = zip(np.split(shard.input_ids[row, : ends[-1]], ends[:-1]), np.split(trained, ends)[:-1], strict=True)
        yield from (ids[mask].astype(np.int64) for ids, mask in own)
