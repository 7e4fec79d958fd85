"""Membership-inference attacks that need one forward pass per model: pure functions of the signals.

Every attack gives one float64 score per document, and a higher score says "member".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualtok.audit.ragged import lowest_mean
from dualtok.audit.token_attacks import dc_pdd_score, error_zone_score, info_rmia_score, surp_score, wbc_score
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dualtok.audit.lira import ShadowFit
    from dualtok.audit.passes import PassResult
    from dualtok.audit.signals import Signals

Scores = NDArray[np.float64]

# A model can be so sure that float32 leaves no variance; below this standard deviation (in nats) it is rounding noise.
SIGMA_FLOOR = 1e-4


@dataclass(frozen=True)
class AttackContext:
    """What an attacker has beside the target model's signals."""

    reference: Signals | None = None
    """Signals of the attacker's reference model over (at least) the same documents."""

    zlib_bytes: Mapping[int, int] | None = None
    """Document id -> bytes of its UTF-8 text compressed by zlib."""

    token_ids: Mapping[int, NDArray[np.int64]] | None = None
    """Document id -> ids of its predicted tokens, in their order."""

    frequencies: NDArray[np.float64] | None = None
    """Share of each token id in a corpus of the attacker's [v], above 0; see
    :func:`~dualtok.audit.token_attacks.smoothed_frequencies`."""

    kl_from_reference: Mapping[int, NDArray[np.float32]] | None = None
    """Document id -> KL(p_reference || p_target) over the vocabulary of its predicted tokens, in nats."""

    min_k_share: float = 0.2
    """Share of a document's least likely tokens that Min-K%, Min-K%++ and SURP look at."""

    passes: Mapping[str, PassResult] = field(default_factory=dict)
    """Name of a further pass -> what it left of (at least) the same documents."""

    missing_passes: Mapping[str, str] = field(default_factory=dict)
    """Name of a pass that was asked for and could not be made -> the reason."""

    con_recall_gamma: float = 0.5
    """Weight of the log-likelihood given members in Con-ReCaLL."""

    shadows: ShadowFit | None = None
    """What shadow models give to (at least) the same documents."""

    @property
    def has(self) -> frozenset[str]:
        """The needs of attacks that this context meets: those of :attr:`Attack.needs`."""
        frequencies = self.frequencies if self.token_ids is not None else None
        given = {"reference": self.reference, "zlib": self.zlib_bytes, "frequencies": frequencies,
                 "kl_from_reference": self.kl_from_reference, "shadows": self.shadows, **self.passes}  # fmt: skip
        return frozenset(name for name, value in given.items() if value is not None)

    def reference_for(self, target: Signals) -> Signals:
        """Return the reference's signals over the target's documents, token by token aligned with them.

        Raises:
            DataError: there is none, a document is missing, or one has another number of tokens (another tokenizer).
        """
        if self.reference is None:
            raise DataError("audit: this attack needs the signals of a reference model")
        reference = self.reference.select(target.document)
        differ = np.flatnonzero(reference.lengths != target.lengths)
        if len(differ):
            raise DataError(
                f"audit: document {target.document[differ[0]]} has {target.lengths[differ[0]]} predicted tokens under "
                f"the target and {reference.lengths[differ[0]]} under the reference; both must use one tokenizer"
            )
        return reference

    def zlib_for(self, target: Signals) -> Scores:
        """Return the compressed size of each of the target's documents, in bytes.

        Raises:
            DataError: a document has no size, or one below 1.
        """
        if self.zlib_bytes is None:
            raise DataError("audit: this attack needs zlib_bytes, the compressed size of each document")
        sizes = np.array([self.zlib_bytes.get(int(document), 0) for document in target.document], dtype=np.float64)
        if (sizes < 1).any():
            raise DataError(
                f"audit: document {target.document[sizes < 1][0]} has no zlib_bytes; run `dualtok prepare` again"
            )
        return sizes

    def pass_for(self, target: Signals, name: str) -> Mapping[str, Scores]:
        """Return what a further pass left of each of the target's documents: column -> [n].

        Raises:
            DataError: the pass was not made, or a document is missing.
        """
        if name not in self.passes:
            raise DataError(f"audit: this attack needs the pass {name!r}")
        return self.passes[name].of(target.document)

    def tokens_for(self, target: Signals) -> tuple[NDArray[np.int64], Scores]:
        """Return the ids of the target's predicted tokens [k], and the frequencies [v].

        Raises:
            DataError: there are none, a document has none or another number of them, or an id has no frequency.
        """
        if self.token_ids is None or self.frequencies is None:
            raise DataError("audit: this attack needs token ids and the frequencies of tokens in a corpus")
        together = _of_tokens(target, self.token_ids, np.dtype(np.int64), "token ids; run `dualtok prepare` again")
        if len(together) and together.max() >= len(self.frequencies):
            raise DataError(f"audit: token {together.max()} is beyond the frequencies of {len(self.frequencies)} ids")
        return together, self.frequencies

    def kl_for(self, target: Signals) -> NDArray[np.float32]:
        """Return KL(p_reference || p_target) of the target's predicted tokens [k].

        Raises:
            DataError: there is none, a document has none or another number of them, or one is not finite.
        """
        if self.kl_from_reference is None:
            raise DataError("audit: this attack needs kl_from_reference, from a pass of both models together")
        together = _of_tokens(
            target, self.kl_from_reference, np.dtype(np.float32), "divergences; remove the signals and audit again"
        )
        if not np.isfinite(together).all():
            raise DataError("audit: a divergence from the reference is not finite; its logits overflow (try fp32)")
        return together


def _of_tokens(target: Signals, values: Mapping[int, NDArray[Any]], dtype: np.dtype[Any], what: str) -> NDArray[Any]:
    """Return a value of each of the target's predicted tokens [k], given by document."""
    nothing = np.zeros(0, dtype=dtype)
    found = [values.get(int(document), nothing) for document in target.document]
    lengths = np.array([len(own) for own in found])
    differ = np.flatnonzero(lengths != target.lengths)
    if len(differ):
        raise DataError(
            f"audit: document {target.document[differ[0]]} has {target.lengths[differ[0]]} predicted tokens and "
            f"{lengths[differ[0]]} {what}"
        )
    return np.concatenate([nothing, *found])


@dataclass(frozen=True)
class Attack:
    """One attack: call it with the target's signals and the attacker's context; returns float64 scores [n]."""

    name: str
    label: str
    """Name in tables."""
    needs: frozenset[str]
    """What the context must have, of "reference", "zlib", "frequencies", "kl_from_reference", "shadows", and passes."""
    source: str
    """One line: the score, and where it was published."""
    score: Callable[[Signals, AttackContext], Scores]

    def __call__(self, target: Signals, context: AttackContext) -> Scores:
        """Return one score per document, higher = member.

        Raises:
            DataError: a document has no predicted token, or the context does not cover the documents.
        """
        target.require_tokens()
        return self.score(target, context)


def loss_score(target: Signals, context: AttackContext) -> Scores:
    """Minus the mean cross-entropy of the document."""
    return -target.mean_loss


def ref_score(target: Signals, context: AttackContext) -> Scores:
    """Mean cross-entropy under the reference minus that under the target: minus the document's mean s(t)."""
    return context.reference_for(target).mean_loss - target.mean_loss


def zlib_score(target: Signals, context: AttackContext) -> Scores:
    """Minus the mean cross-entropy (nats per token, not the sum) divided by the document's compressed bytes."""
    return -target.mean_loss / context.zlib_for(target)


def min_k_score(target: Signals, context: AttackContext) -> Scores:
    """Mean log p of the document's least likely tokens."""
    return lowest_mean(target.log_prob, target.offsets, context.min_k_share)


def min_k_plus_plus_score(target: Signals, context: AttackContext) -> Scores:
    """Mean of the document's lowest (log p - mu) / sigma, mu and sigma over the vocabulary under p itself."""
    sigma = np.maximum(np.sqrt(target.var_log_prob.astype(np.float64)), SIGMA_FLOOR)
    normalised = (target.log_prob.astype(np.float64) - target.mean_log_prob) / sigma
    return lowest_mean(normalised, target.offsets, context.min_k_share)


_ALL = (
    Attack("loss", "Loss", frozenset(), "minus the mean loss (Yeom et al. 2018)", loss_score),
    Attack(
        "ref",
        "Ref",
        frozenset({"reference"}),
        "mean loss under a reference model minus mean loss (Carlini et al. 2021; Mireshghallah et al. 2022)",
        ref_score,
    ),
    Attack(
        "zlib",
        "Zlib",
        frozenset({"zlib"}),
        "minus the mean loss per token divided by the zlib-compressed bytes of the text (Carlini et al. 2021)",
        zlib_score,
    ),
    Attack(
        "min_k",
        "Min-K%",
        frozenset(),
        "mean log-probability of the least likely tokens (Shi et al. 2024)",
        min_k_score,
    ),
    Attack(
        "min_k_plus_plus",
        "Min-K%++",
        frozenset(),
        "the same after standardising each log-probability over the vocabulary (Zhang et al. 2024)",
        min_k_plus_plus_score,
    ),
    Attack(
        "surp",
        "SURP",
        frozenset(),
        "mean log-probability of the least likely tokens where the model is certain (Zhang and Wu 2024)",
        surp_score,
    ),
    Attack(
        "dc_pdd",
        "DC-PDD",
        frozenset({"frequencies"}),
        "clipped cross-entropy of each token's probability and its frequency in a corpus, first occurrences "
        "(Zhang et al. 2024, arXiv 2409.14781)",
        dc_pdd_score,
    ),
    Attack(
        "wbc",
        "WBC",
        frozenset({"reference"}),
        "share of windows of 2 to 40 tokens that the reference predicts worse (Chen et al. 2026, arXiv 2601.02751)",
        wbc_score,
    ),
    Attack(
        "error_zone",
        "EZ",
        frozenset({"reference"}),
        "gains over losses against the reference where the likeliest token is wrong (Ilic et al. 2026, arXiv "
        "2601.12104)",
        error_zone_score,
    ),
    Attack(
        "info_rmia",
        "InfoRMIA",
        frozenset({"reference", "kl_from_reference"}),
        "log-ratio of each token's probabilities plus the reference's divergence from the model (Tao and Shokri 2025, "
        "arXiv 2510.05582)",
        info_rmia_score,
    ),
)
ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}
