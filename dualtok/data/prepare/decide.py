"""What becomes of each document: a split, or why it is left out. Decided in the order of the source, for the first
occurrence of a duplicate is the one that stays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dualtok.config.data import SPLITS
from dualtok.data.prepare.groups import Groups, Membership, is_short
from dualtok.data.prepare.splits import assign_split, dealt_by
from dualtok.data.prepare.staged import CHAT, GROUP, Chunk, Staged, fixed_width, is_full
from dualtok.errors import DataError
from dualtok.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dualtok.config.data import DataConfig
    from dualtok.monitor.progress import RunProgress

LENGTHS_AT_ONCE = 1 << 12
DECISIONS = (*SPLITS, "unused", "too_short", "exact", "near")
UNUSED, TOO_SHORT, EXACT, NEAR = range(len(SPLITS), len(DECISIONS))


class UnusableCorpusError(DataError):
    """Of this corpus nothing is left, for a split or altogether; another start could not go on."""


@dataclass
class Decisions:
    """What happened to all documents."""

    chunks: list[Chunk] = field(default_factory=list)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(DECISIONS), dtype=np.int64))
    """Documents by decision."""
    reference_characters: int = 0
    """Length of the split ``reference``, on which a tokenizer is trained."""
    compared_by_characters: int = 0
    """Documents whose n-grams are of characters."""
    in_groups: int = 0
    """Documents that have a group."""
    conversations: int = 0
    """Documents that are conversations, those left out as well."""
    conversations_kept: int = 0
    """Those of them that are in a split."""

    def count(self, decision: str) -> int:
        """Return how many documents were decided so."""
        return int(self.counts[DECISIONS.index(decision)])

    @property
    def read(self) -> int:
        """Return how many documents were read."""
        return int(self.counts.sum())

    def check(self, config: DataConfig) -> None:
        """Refuse a corpus of which nothing is left, for a split or altogether.

        Raises:
            UnusableCorpusError: names the source or the split.
        """
        kept = int(self.counts[: UNUSED + 1].sum())
        if kept == 0:
            raise UnusableCorpusError(
                f"{config.source}: empty corpus: {self.read} documents read, {self.count('too_short')} too short, "
                "none left"
            )
        if config.group_field is not None and not self.in_groups:
            raise UnusableCorpusError(
                f"{config.source}: no document has a field {config.group_field!r} that names its group "
                "(data.group_field); correct the name, or leave it out"
            )
        if not self.conversations and config.rows == "auto":
            for setting in ("chat_template", "train_on"):
                if getattr(config, setting) is not None:
                    raise UnusableCorpusError(
                        f"{config.source}: holds no conversation, so that data.{setting} has no effect; remove it, or "
                        "give rows with messages"
                    )
        if self.conversations and config.canaries is not None:
            raise UnusableCorpusError(
                f"{config.source}: holds conversations, and data.canaries are texts, which would be told from them at "
                "once; remove data.canaries"
            )
        for split, share in config.shares.items():
            if not self.count(split):
                raise UnusableCorpusError(
                    f"data.shares.{split}: a share of {share:g} of {kept} documents leaves the split empty; "
                    "raise the share, leave the split out, or give more documents"
                )


def decisions_path(folder: Path, chunk: Chunk) -> Path:
    """Return the file of a chunk's decisions, uint8 indices of :data:`DECISIONS`."""
    return folder / f"decisions-{chunk.number:06d}.npy"


def decide(config: DataConfig, staged: Staged, groups: Groups, progress: RunProgress) -> Decisions:
    """Decide chunk after chunk, keeping what an interrupted start had decided."""
    folder = staged.at.folder
    decider = _Decider(config, staged)
    result = Decisions()
    for chunk in _cut(staged):
        members = groups.of(chunk.first, chunk.end)
        path = decisions_path(folder, chunk)
        if path.is_file():
            decisions = np.load(path)
            for doc, memberships in members.items():
                decider.remember(doc, memberships, kept=decisions[doc - chunk.first] <= UNUSED)
        else:
            decisions = decider.decisions(chunk, members)
            with atomic_file(path) as stream:
                np.save(stream, decisions)
        result.chunks.append(chunk)
        result.counts += np.bincount(decisions, minlength=len(DECISIONS))
        further = [*([] if config.group_field is None else [GROUP]), *([] if config.rows == "text" else [CHAT])]
        columns = ["of_characters", *further]
        table = staged.take(np.arange(chunk.first, chunk.end), columns)
        result.compared_by_characters += int(table["of_characters"].to_numpy().sum())
        result.in_groups += 0 if config.group_field is None else len(table) - table[GROUP].null_count
        if config.rows != "text":
            is_chat = table[CHAT].is_valid().to_numpy()
            result.conversations += int(is_chat.sum())
            result.conversations_kept += int((is_chat & (decisions < len(SPLITS))).sum())
        reference = np.flatnonzero(decisions == SPLITS.index("reference"))
        if len(reference):
            lengths = staged.take(chunk.first + reference, ["n_characters"])["n_characters"].to_numpy()
            result.reference_characters += int(lengths.sum())
        progress.advance(1, f"{result.counts[:UNUSED].sum():,} kept")
    return result


def _cut(staged: Staged) -> Iterator[Chunk]:
    """Cut the sequence of documents into chunks, bounded in number and in characters."""
    first = number = 0
    while first < staged.documents:
        end, characters = first, 0
        while end < staged.documents and not is_full(end - first, characters):
            docs = np.arange(end, min(end + LENGTHS_AT_ONCE, staged.documents))
            for length in staged.take(docs, ["n_characters"])["n_characters"].to_pylist():
                end, characters = end + 1, characters + length
                if is_full(end - first, characters):
                    break
        yield Chunk(number, first, end)
        first, number = end, number + 1


class _Decider:
    """Decides documents in order, and remembers the kept ones of each group that is still open."""

    def __init__(self, config: DataConfig, staged: Staged) -> None:
        self._config, self._staged = config, staged
        self._open: dict[int, list[int]] = {}

    def remember(self, doc: int, memberships: list[Membership], *, kept: bool) -> None:
        """Note a decided document in its groups; a group ends with its last document."""
        for key, last in memberships:
            if doc == last:
                self._open.pop(key, None)
            elif kept:
                self._open.setdefault(key, []).append(doc)

    def decisions(self, chunk: Chunk, members: dict[int, list[Membership]]) -> NDArray[np.uint8]:
        """Return the decisions about a chunk's documents."""
        config = self._config
        columns = ["sha256", "n_characters", "blank", *([] if config.group_field is None else [GROUP])]
        table = self._staged.take(np.arange(chunk.first, chunk.end), columns)
        groups = [None] * len(table) if config.group_field is None else table[GROUP].to_pylist()
        short = is_short(table, config)
        sketches = _Sketches(self._staged, config, self._needed(members))
        decisions = np.empty(chunk.end - chunk.first, dtype=np.uint8)
        for position, digest in enumerate(table["sha256"].to_pylist()):
            doc = chunk.first + position
            memberships = members.get(doc, [])
            candidates = {other for key, _ in memberships for other in self._open.get(key, ())}
            if short[position]:
                decisions[position] = TOO_SHORT
            elif (duplicate := sketches.duplicate(doc, sorted(candidates))) is not None:
                decisions[position] = duplicate
            else:
                split = assign_split(dealt_by(digest, groups[position]), config.shares, config.seed)
                decisions[position] = UNUSED if split is None else DECISIONS.index(split)
            self.remember(doc, memberships, kept=decisions[position] <= UNUSED)
        return decisions

    def _needed(self, members: dict[int, list[Membership]]) -> list[int]:
        """Return the documents that may be compared in a chunk: its own in groups, and those kept before."""
        keys = {key for memberships in members.values() for key, _ in memberships}
        return sorted({*members, *(doc for key in keys for doc in self._open.get(key, ()))})


class _Sketches:
    """Digests and signatures of some documents."""

    def __init__(self, staged: Staged, config: DataConfig, docs: list[int]) -> None:
        self._threshold = config.near_duplicate_threshold
        self._position = {doc: position for position, doc in enumerate(docs)}
        if not docs:
            return
        columns = ["exact"] if self._threshold is None else ["exact", "signature"]
        table = staged.take(np.array(docs), columns)
        self._exact = fixed_width(table, "exact", np.uint8)
        self._signatures = None if self._threshold is None else fixed_width(table, "signature", np.uint32)

    def duplicate(self, doc: int, candidates: list[int]) -> int | None:
        """Return whether a document is an exact or a near duplicate of one of the candidates."""
        if not candidates:
            return None
        own, others = self._position[doc], [self._position[other] for other in candidates]
        if (self._exact[others] == self._exact[own]).all(axis=1).any():
            return EXACT
        if self._signatures is None or self._threshold is None:
            return None
        similarity = (self._signatures[others] == self._signatures[own]).mean(axis=1)
        return NEAR if similarity.max() >= self._threshold else None
