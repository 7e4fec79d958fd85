"""What an audit takes from the signals of its shadow models: they are looked at one by one, and never held together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.adaptive import features
from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.attacks.encoder import MOST_SEQUENCES, fit_encoder, windows
from dualtok.audit.attacks.learned import CLASSIFIER, ENCODER, MOST_ROWS, choose_rows, fit_shadow_classifier
from dualtok.commands.audit.shadows import document_losses, fit_losses
from dualtok.data.folds import in_shadow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import Learned, ShadowFit
    from dualtok.audit.attacks.encoder import Windows
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
    windows: list[tuple[Windows, NDArray[np.bool_]]] = field(default_factory=list)
    """The same for the encoder of LT-MIA."""

    def add(self, number: int, signals: Mapping[str, Signals]) -> None:
        """Take what is needed of one shadow's signals over members and non-members; numbers are given in their order.

        Raises:
            DataError: the attacker's reference was run over other documents, or has another tokenizer.
        """
        if not signals:
            return
        self.losses.append(document_losses(signals.values()))
        if self.reference is None:
            return
        if CLASSIFIER in self.settings.attacks:
            pairs = list(self._chosen(number, signals, self.reference, MOST_ROWS))
            self.rows.append((np.concatenate([features(*pair) for pair in pairs]), self._inside(pairs, number)))
        if ENCODER in self.settings.attacks:
            pairs = list(self._chosen(number, signals, self.reference, MOST_SEQUENCES))
            parts = [windows(*pair) for pair in pairs]
            x, mask = np.concatenate([x for x, _ in parts]), np.concatenate([mask for _, mask in parts])
            self.windows.append(((x, mask), self._inside(pairs, number)))

    def _inside(self, pairs: list[tuple[Signals, Signals]], number: int) -> NDArray[np.bool_]:
        return in_shadow(np.concatenate([target.document for target, _ in pairs]), number, self.seed)

    def _chosen(
        self, number: int, signals: Mapping[str, Signals], reference: Mapping[str, Signals], most: int
    ) -> Iterator[tuple[Signals, Signals]]:
        """Yield the documents of each split that attacks learn from, under the shadow and under the reference."""
        sides = {split: side.with_tokens() for split, side in signals.items()}
        assert self.settings.shadows is not None
        documents = sum(side.n_documents for side in sides.values())
        chosen = choose_rows(documents, self.settings.shadows, number, self.settings.seed, most)
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
        found: dict[str, Learned] = {}
        if self.rows:
            found[CLASSIFIER] = fit_shadow_classifier(self.rows, self.settings.seed)
        if self.windows:
            found[ENCODER] = fit_encoder(self.windows, self.settings.seed)
        return found
