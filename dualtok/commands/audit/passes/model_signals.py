"""The audit's model passes over packed blocks, shared by all ranks, and the files that keep what they left.

Every model is run once over members, non-members and canaries; with InfoRMIA once more beside the attacker's reference.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.signals.files import FORMAT, write_ragged
from dualtok.audit.signals.from_logits import token_signals
from dualtok.audit.signals.signals import TOKEN_DTYPES, PlacedSegment, Signals, SignalsBuilder, merged
from dualtok.audit.statistics.evaluate import choose_documents
from dualtok.commands.audit.passes.canaries import KIND, canary_pass
from dualtok.commands.audit.passes.joint import KL_DTYPES, joint_forward, read_divergences
from dualtok.distributed.forward_only import build_forward_only
from dualtok.monitor.progress import RunProgress
from dualtok.reference.fingerprint import blocks_digest, weights_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.commands.audit.passes.canaries import CanarySource
    from dualtok.data.folder import DataFolder
    from dualtok.data.packing import Segment
    from dualtok.distributed.ranks import Ranks

Divergences = dict[int, "NDArray[np.float32]"]


@dataclass(frozen=True)
class ModelPasses:
    """Runs models over an audit's documents; every rank calls every method, rank 0 alone gets the signals."""

    settings: AuditConfig
    data: DataFolder
    folder: Path
    """Where files are kept."""
    ranks: Ranks
    canaries: CanarySource | None = None
    """Canaries among the members. They are not audited with the others, for canaries are trivially distinguishable."""
    progress: bool = True
    """Whether rank 0 shows how far a pass is."""

    digests: dict[Path, str] = field(default_factory=dict)
    """Model folder -> digest of the weights that :meth:`key` found in it."""

    def key(self, model: Path) -> str:
        """Name signals by all they depend on: weights, blocks, tokenizer, precision and choice of documents.

        And by their format, so that signals of an earlier version are computed again.
        """
        settings = self.settings
        self.digests[model] = weights_digest(model)
        parts = [
            str(FORMAT),
            self.digests[model],
            blocks_digest(self.data.manifest),
            self.data.manifest.tokenizer_fingerprint,
            settings.precision,
            str(settings.max_documents),
            str(settings.seed),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def left_out(self, split: str) -> set[int]:
        """Return the documents of a split that are not audited with the others."""
        return set() if self.canaries is None else self.canaries.documents(split)

    def signals(
        self, name: str, model: Path, key: str, *, attacker: bool = False, with_canaries: bool = True
    ) -> dict[str, Signals]:
        """Return a model's signals over members and non-members, and over canaries if there are any."""
        settings = self.settings
        files = self._files(key)
        if self.canaries is not None and with_canaries:
            files[KIND] = self._file(f"{key}-{self.canaries.key(attacker=attacker)}")
        if not self._are_there(files):
            forward = build_forward_only(
                model,
                precision=settings.precision,
                batch_size=settings.batch_size,
                deepspeed_json=settings.deepspeed,
                ranks=self.ranks,
                signals=token_signals,
                trust_remote_code=settings.trust_remote_code,
            )
            for kind, file in files.items():
                title = f"audit {name}, {kind}"
                if self.canaries is not None and kind == KIND:
                    builder = canary_pass(self.canaries, forward, title, self.ranks, attacker=attacker)
                else:
                    builder = self.over_split(kind, forward, title)
                if builder is not None:
                    builder.build().save(file)
            self.ranks.barrier()
        return {kind: Signals.load(file) for kind, file in files.items()} if self.ranks.is_first else {}

    def divergences(self, name: str, model: Path, reference: Path, keys: tuple[str, str]) -> dict[str, Divergences]:
        """Return KL(p_reference || p) of a model's members and non-members: split -> document -> [tokens].

        ``keys`` are the model's and the reference's.
        """
        files = self._files("-".join(keys))
        if not self._are_there(files):
            forward = joint_forward(model, reference, self.settings, self.ranks)
            for split, file in files.items():
                builder = self.over_split(split, forward, f"compare {name}, {split}", dtypes=KL_DTYPES)
                if builder is not None:
                    write_ragged(file, builder.build_ragged())
            self.ranks.barrier()
        return {split: read_divergences(file) for split, file in files.items()} if self.ranks.is_first else {}

    def _files(self, key: str) -> dict[str, Path]:
        """Return the file of each class' split for what a key names."""
        return {split: self._file(f"{key}-{split}") for split in self.settings.splits}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"

    def _are_there(self, files: dict[str, Path]) -> bool:
        return bool(self.ranks.from_first(all(file.is_file() for file in files.values())))

    def over_split(
        self,
        split: str,
        forward: Callable[[Any], Any],
        title: str,
        *,
        dtypes: Mapping[str, type[np.generic]] = TOKEN_DTYPES,
    ) -> SignalsBuilder | None:
        """Run a model over the chosen documents of a split; returns all ranks' signals on rank 0, None elsewhere."""
        settings, ranks = self.settings, self.ranks
        stream = ranks.together(
            lambda: self.data.open(split, verify_rank=ranks.rank, verify_world_size=ranks.world_size)
        )
        table = self.data.documents(split)
        left_out = self.left_out(split)
        numbers, tokens = table["doc"].to_pylist(), table["n_tokens"].to_pylist()
        lengths = {number: length for number, length in zip(numbers, tokens, strict=True) if number not in left_out}
        chosen = choose_documents(np.array(list(lengths)), settings.max_documents, settings.seed)
        builder = SignalsBuilder({int(document): lengths[int(document)] for document in chosen}, dtypes)
        documents = None if settings.max_documents is None else chosen
        calls = stream.sequential_batches(settings.batch_size, ranks.world_size, documents=documents)
        shown = ranks.is_first and self.progress
        with RunProgress(title, calls, active=shown, plain_every=max(1, calls // 4)) as progress:
            for batch, segments in stream.sequential(
                settings.batch_size, ranks.rank, ranks.world_size, documents=documents
            ):
                builder.add(forward(batch), batch["labels"], [with_columns(row) for row in segments])
                progress.advance(1)
        return merged(ranks.gather_objects_to_first(builder))


def with_columns(row: list[Segment]) -> list[PlacedSegment]:
    """Add to each (document, start, length) of a block the column where it lies: pieces are laid end to end."""
    pieces, column = [], 0
    for document, start, length in row:
        pieces.append(PlacedSegment(document, start, length, column))
        column += length
    return pieces
