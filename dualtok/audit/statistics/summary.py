"""What an audit needs of a class of documents, taken from its signals whole or part by part.

A part's signals can be dropped once it is added: what is kept is a few numbers per document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import ATTACKS, AttackContext
from dualtok.audit.attacks.registry import Judged, judge
from dualtok.audit.report.data import TokenHistogram
from dualtok.audit.statistics.regurgitation import ClassPassages, class_passages
from dualtok.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals

# The same bins for every model, in nats, so that panels can be compared; a bin's edge lies on 0, the threshold tau.
CALIBRATED_EDGES = np.linspace(-8.0, 8.0, 65)


@dataclass
class ClassSummary:
    """Scores and sums of the documents of one class."""

    config: AuditConfig
    """The attacks to run, and the length of passages."""
    block_length: int | None = None
    """Tokens after which longer documents were cut."""
    documents: int = 0
    left_out: int = 0
    """Documents without a predicted token."""
    tokens: int = 0
    log_prob: float = 0.0
    """Sum over tokens, in nats."""
    calibrated: float = 0.0
    """Sum of s(t) over tokens, in nats."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CALIBRATED_EDGES) - 1, dtype=np.int64))
    """Tokens in each bin of s(t)."""
    context: AttackContext | None = None
    """What the attacker had beside the first part."""
    parts: list[Judged] = field(default_factory=list)
    document: list[NDArray[np.int64]] = field(default_factory=list)
    """Ids of the documents, part by part."""
    passages: list[ClassPassages] = field(default_factory=list)

    def add(self, signals: Signals, context: AttackContext) -> None:
        """Judge a part of the class.

        Raises:
            DataError: the context does not fit the documents, or lacks what the first part's had.
        """
        target = signals.with_tokens()
        self.left_out += signals.n_documents - target.n_documents
        if target.n_documents == 0:
            return
        first = self.context or context
        missing = first.has - context.has
        if missing:
            raise DataError(
                f"audit: from document {target.document[0]} on the attacker has no {', '.join(sorted(missing))}, which "
                "they had for those before; give every part the same"
            )
        if self.context is None:
            self.context = context
        usable = [name for name in self.config.attacks if ATTACKS[name].needs <= first.has]
        self.parts.append(judge(target, context, usable))
        self.document.append(target.document)
        self.passages.append(class_passages(target, self.config, self.block_length))
        self.documents += target.n_documents
        self.tokens += target.n_tokens
        self.log_prob += float(np.sum(target.log_prob, dtype=np.float64))
        if "reference" in first.has:
            s = context.reference_for(target).log_prob.astype(np.float64) - target.log_prob
            inside = np.clip(s, CALIBRATED_EDGES[0], CALIBRATED_EDGES[-1])
            self.counts += np.histogram(inside, CALIBRATED_EDGES)[0]
            self.calibrated += float(s.sum())

    def judged(self) -> Judged:
        """Return what was found of all documents, and let go of the parts."""
        whole = Judged.joined(self.parts)
        self.parts = []
        return whole

    def ids(self) -> NDArray[np.int64]:
        """Return the ids of all documents, in the order of their scores."""
        return np.concatenate(self.document)

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy over all tokens, in nats."""
        return -(self.log_prob / self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of :attr:`mean_loss`."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean_loss))


def calibrated_histogram(members: ClassSummary, non_members: ClassSummary) -> TokenHistogram:
    """Return how s(t) is distributed over the tokens of both classes."""
    return TokenHistogram(
        edges=CALIBRATED_EDGES.tolist(),
        members=members.counts.tolist(),
        non_members=non_members.counts.tolist(),
        mean_members=members.calibrated / members.tokens,
        mean_non_members=non_members.calibrated / non_members.tokens,
    )
