"""The canaries' part of ``dualtok audit``: their texts and candidates as blocks, and a model's pass over them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from dualtok.audit.canaries.audit import CanaryTexts
from dualtok.audit.signals.signals import PlacedSegment, SignalsBuilder, merged
from dualtok.data.packing import model_inputs, pack_documents, pad_rows
from dualtok.data.prepare.canaries import canary_config, candidates, load_canaries
from dualtok.data.tokenizer import encode
from dualtok.monitor.progress import RunProgress
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.config.canaries import CanaryConfig
    from dualtok.data.folder import DataFolder
    from dualtok.data.prepare.canaries import Canary
    from dualtok.distributed.ranks import Ranks

KIND = "canaries"
"""The name of their signals, beside those of splits."""


@dataclass(frozen=True)
class CanarySource:
    """The canaries of a prepared folder, and what is needed to make their texts."""

    canaries: list[Canary]
    settings: CanaryConfig
    audit: AuditConfig
    data: DataFolder

    def documents(self, split: str) -> set[int]:
        """Return the numbers of the canaries among a split's documents."""
        return {canary.doc for canary in self.canaries if canary.doc is not None} if split == "train" else set()

    def count(self, *, attacker: bool) -> int:
        """Return how many candidates of each canary a model reads: the attacker's reference none."""
        return 0 if attacker else min(self.audit.canary_candidates, self.settings.space - 1)

    def key(self, *, attacker: bool) -> str:
        """Name all that a model reads here."""
        canaries = self.data.manifest.canaries
        assert canaries is not None
        content = f"{canaries.sha256}\n{self.count(attacker=attacker)}"
        return f"{KIND}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @cached_property
    def encoded(self) -> list[list[int]]:
        """Token ids of the canaries."""
        return encode(self.data.tokenizer, [canary.text for canary in self.canaries])

    def texts(self) -> CanaryTexts:
        """Return the canaries as the audited models see them."""
        return CanaryTexts(
            included=np.array([canary.included for canary in self.canaries]),
            secret=None if self.settings.kind == "high_temperature" else self._secrets(),
            candidates=self.count(attacker=False),
            space=self.settings.space,
            kind=self.settings.kind,
            judged_by_secret=self.settings.kind == "new_tokens",
        )

    def _secrets(self) -> NDArray[np.int64]:
        """Return the first token of each secret and one past its last."""
        prefixes = encode(self.data.tokenizer, [canary.prefix for canary in self.canaries])
        secrets = []
        for ids, prefix in zip(self.encoded, prefixes, strict=True):
            # A tokenizer may join the prefix's end with the secret's beginning: such a token is one of the secret.
            same = next(index for index, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b)
            secrets.append((max(1, same), len(ids) - 1))
        return np.array(secrets, dtype=np.int64)

    def documents_to_read(self, *, attacker: bool) -> dict[int, list[int]]:
        """Return number -> token ids of each text that a model reads, numbered as in :class:`CanaryTexts`."""
        step = self.count(attacker=False) + 1
        own = {index * step: ids for index, ids in enumerate(self.encoded)}
        if attacker or step == 1:
            return own
        others = [
            f"{canary.prefix} {secret}"
            for canary in self.canaries
            for secret in candidates(canary, self.settings, step - 1)
        ]
        numbers = [number for number in range(len(self.canaries) * step) if number % step]
        return own | dict(zip(numbers, encode(self.data.tokenizer, others), strict=True))


def open_canaries(audit: AuditConfig, data: DataFolder) -> CanarySource | None:
    """Return the canaries of prepared data; None if it was prepared without.

    Raises:
        DataError: their record is missing or altered.
    """
    if data.manifest.canaries is None:
        return None
    return CanarySource(load_canaries(data.location, data.manifest), canary_config(data.manifest), audit, data)


def canary_pass(
    source: CanarySource, forward: Callable[[Any], Any], title: str, ranks: Ranks, *, attacker: bool
) -> SignalsBuilder | None:
    """Run a model over canaries and candidates; returns all ranks' signals on rank 0, None elsewhere.

    Every rank makes the same number of calls with ``audit.batch_size`` rows, as under ZeRO-3 each is a collective.
    """
    ids = {number: np.array(row, np.int32) for number, row in source.documents_to_read(attacker=attacker).items()}
    blocks = pack_documents(list(ids.items()), source.data.manifest.block_length)
    rows = source.audit.batch_size
    calls = -(-len(blocks) // (rows * ranks.world_size))
    builder = SignalsBuilder({number: len(row) for number, row in ids.items()})
    with RunProgress(title, calls, active=ranks.is_first, plain_every=max(1, calls // 4)) as progress:
        for call in range(calls):
            first = (call * ranks.world_size + ranks.rank) * rows
            mine = blocks[first : first + rows]
            there = mine or blocks[:1]
            lengths = [np.array([piece.length for piece in block.segments], np.int32) for block in there]
            batch = model_inputs(np.stack([block.input_ids for block in there]), lengths)
            if not mine:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
            batch = pad_rows(batch, rows)
            pieces = []
            for block in mine:
                columns = np.cumsum([0, *(piece.length for piece in block.segments)])
                pieces.append(
                    [PlacedSegment(*piece, column) for piece, column in zip(block.segments, columns, strict=False)]
                )
            builder.add(forward(batch), batch["labels"], pieces + [[]] * (rows - len(mine)))
            progress.advance(1)
    return merged(ranks.gather_objects_to_first(builder))
