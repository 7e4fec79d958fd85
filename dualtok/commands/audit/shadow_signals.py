"""What an audit takes from the signals of its shadow models: they are looked at one by one, and never held together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.adaptive import features
from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.attacks.learned import CLASSIFIER, MOST_ROWS, choose_rows, fit_shadow_classifier
from dualtok.commands.audit.shadows import document_losses, fit_losses
from dualtok.data.folds import in_shadow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import Learned, ShadowFit
    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals
    from dualtok.commands.audit.shadows import DocumentLosses

    Rows = tuple[NDArray[np.float64], NDArray[np.bool_]]
    """Features [r, f] of documents of one shadow, and whether it learned them [r]."""


@dataclass
class ShadowSignals:
    """What is kept of the shadows' signals; on other ranks than the first there are none, and nothing is kept."""

    settings: AuditConfig
    seed: int
    """The audited run's: it decides which shadow learned which document."""
    reference: Mapping[str, Signals] | None
    """Split -> signals of the attacker's reference, if there is one."""
    losses: list[DocumentLosses] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)

    def add(self, number: int, signals: Mapping[str, Signals]) -> None:
        """Take what is needed of one shadow's signals over members and non-members; numbers are given in their order.

        Raises:
            DataError: the attacker's reference was run over other documents, or has another tokenizer.
        """
        if not signals:
            return
        self.losses.append(document_losses(signals.values()))
        if CLASSIFIER in self.settings.attacks and self.reference is not None:
            pairs = list(self._chosen(number, signals, self.reference))
            inside = in_shadow(np.concatenate([target.document for target, _ in pairs]), number, self.seed)
            self.rows.append((np.concatenate([features(*pair) for pair in pairs]), inside))

    def _chosen(
        self, number: int, signals: Mapping[str, Signals], reference: Mapping[str, Signals]
    ) -> Iterator[tuple[Signals, Signals]]:
        """Yield the documents of each split that attacks learn from, under the shadow and under the reference."""
        sides = {split: side.with_tokens() for split, side in signals.items()}
        assert self.settings.shadows is not None
        documents = sum(side.n_documents for side in sides.values())
        chosen = choose_rows(documents, self.settings.shadows, number, self.settings.seed, MOST_ROWS)
        first = 0
        for split, side in sides.items():
            own = chosen[(chosen >= first) & (chosen < first + side.n_documents)] - first
            first += side.n_documents
            target = side.take(own)
            yield target, AttackContext(reference=reference[split]).reference_for(target)

    def fit(self) -> ShadowFit | None:
        """Return the Gaussians of LiRA; None without shadows."""
        return fit_losses(self.losses, self.seed) if self.losses else None

    def learn(self) -> dict[str, Learned]:
        """Return what attacks learned: those of ``audit.attacks`` that the shadows and the reference suffice for."""
        return {CLASSIFIER: fit_shadow_classifier(self.rows, self.settings.seed)} if self.rows else {}
