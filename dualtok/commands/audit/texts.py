"""What the audit reads of the documents themselves, beside what the models make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.token_level import smoothed_frequencies
from dualtok.objective.head import IGNORED_LABEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.data.folder import DataFolder
    from dualtok.data.stream.documents import Piece

    Pieces = list[Piece]


def predicted_ids(pieces: dict[int, Pieces]) -> dict[int, NDArray[np.int64]]:
    """Return the ids of each document's predicted tokens: the first one of a piece is none, nor one not trained."""
    return {
        document: np.concatenate([part.ids[part.predicted] for part in parts]) for document, parts in pieces.items()
    }


def attacker_frequencies(data: DataFolder, settings: AuditConfig) -> NDArray[np.float64] | None:
    """Return each token id's smoothed share [v] of the predicted tokens of the attacker's corpus.

    That is the split ``attack_reference`` or, where the data has none or the audit is of it, ``reference``; None if
    neither will do.
    """
    splits, audited = data.manifest.splits, settings.splits
    split = next((s for s in ("attack_reference", "reference") if s in splits and s not in audited), None)
    if split is None or not splits[split].blocks:
        return None
    counts = np.zeros(data.manifest.vocabulary, dtype=np.int64)
    for batch, _ in data.open(split).sequential(settings.batch_size):
        labels = batch["labels"]
        counts += np.bincount(labels[labels != IGNORED_LABEL].numpy(), minlength=data.manifest.vocabulary)
    return smoothed_frequencies(counts)
