"""What an attack is, what an attacker knows, and the registry that every attack enters by one decorator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dualtok.audit.signals.reruns import RerunResult
    from dualtok.audit.signals.signals import Signals

Scores = NDArray[np.float64]
PairOfScores = tuple[Scores, Scores]
"""Of the members and of the non-members."""
Learned = Callable[["Signals", "Signals"], Scores]
"""Function from signals of a model and, aligned with them, of the attacker's reference to the documents' scores."""
Kind = Literal["single_pass", "joint", "rerun", "knows_defence", "shadows"]
"""What an attack costs beside the one pass of each model that all share: nothing; a pass of the model and the
attacker's reference together; running each model again over changed texts; nothing, but it knows the defence; training
shadow models."""


@dataclass(frozen=True, eq=False)
class ShadowFit:
    """The two Gaussians of each document; all arrays are float64 [n]."""

    document: NDArray[np.int64]
    """Ids, each once."""
    mean_in: Scores
    """Mean statistic of the shadows that learned the document."""
    mean_out: Scores
    """Mean statistic of the others."""
    sigma_in: Scores
    sigma_out: Scores

    def of(self, documents: NDArray[np.int64]) -> ShadowFit:
        """Return the fit of some documents, in their order.

        Raises:
            DataError: the shadows were not run over one of them.
        """
        order = np.argsort(self.document)
        position = np.minimum(np.searchsorted(self.document, documents, sorter=order), len(order) - 1)
        rows = order[position]
        missing = self.document[rows] != documents
        if missing.any():
            raise DataError(f"audit: the shadow models were not run over document {documents[missing][0]}")
        return ShadowFit(documents, self.mean_in[rows], self.mean_out[rows], self.sigma_in[rows], self.sigma_out[rows])


@dataclass(frozen=True)
class AttackContext:
    """What an attacker has beside the target model's signals."""

    reference: Signals | None = None
    """Signals of the attacker's reference model over (at least) the same documents."""

    further_references: Mapping[str, Signals] = field(default_factory=dict)
    """Name -> signals of other references of the attacker's: attacks that need one are run with each."""

    zlib_bytes: Mapping[int, int] | None = None
    """Document id -> bytes of its UTF-8 text compressed by zlib."""

    token_ids: Mapping[int, NDArray[np.int64]] | None = None
    """Document id -> ids of its predicted tokens, in their order."""

    frequencies: NDArray[np.float64] | None = None
    """Share of each token id in a corpus of the attacker's [v], above 0; see
    :func:`.token_level.smoothed_frequencies`."""

    kl_from_reference: Mapping[int, NDArray[np.float32]] | None = None
    """Document id -> KL(p_reference || p_target) over the vocabulary of its predicted tokens, in nats."""

    min_k_share: float = 0.2
    """Share of a document's least likely tokens that Min-K%, Min-K%++ and SURP look at."""

    reruns: Mapping[str, RerunResult] = field(default_factory=dict)
    """Name of a rerun -> what it left of (at least) the same documents."""

    missing_reruns: Mapping[str, str] = field(default_factory=dict)
    """Name of a rerun that was asked for and could not be made -> the reason."""

    con_recall_gamma: float = 0.5
    """Weight of the log-likelihood given members in Con-ReCaLL."""

    shadows: ShadowFit | None = None
    """What shadow models give to (at least) the same documents."""

    learned: Mapping[str, Learned] = field(default_factory=dict)
    """Name of an attack -> what it learned from shadow models."""

    @property
    def has(self) -> frozenset[str]:
        """The needs of attacks that this context meets: those of :attr:`Attack.needs`."""
        frequencies = self.frequencies if self.token_ids is not None else None
        given = {
            "reference": self.reference,
            "zlib": self.zlib_bytes,
            "frequencies": frequencies,
            "kl_from_reference": self.kl_from_reference,
            "shadows": self.shadows,
            **self.reruns,
        }
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

    def learned_for(self, target: Signals, name: str) -> Scores:
        """Return the scores [n] that an attack learned from shadow models gives to the target's documents.

        Raises:
            DataError: it did not learn from any, or the reference does not cover the documents.
        """
        if name not in self.learned:
            raise DataError(f"audit: {name!r} must learn from shadow models first (`dualtok audit --shadows N`)")
        return self.learned[name](target, self.reference_for(target))

    def rerun_for(self, target: Signals, name: str) -> Mapping[str, Scores]:
        """Return what a rerun left of each of the target's documents: column -> [n].

        Raises:
            DataError: the rerun was not made, or a document is missing.
        """
        if name not in self.reruns:
            raise DataError(f"audit: this attack needs the rerun {name!r}")
        return self.reruns[name].of(target.document)

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
    """One attack with all that settings, tables and documentation say about it."""

    name: str
    """Name in ``audit.attacks``."""
    label: str
    """Name in tables."""
    source: str
    """One line: the score, and where it was published."""
    kind: Kind
    needs: frozenset[str]
    """What the context must have, of "reference", "zlib", "frequencies", "kl_from_reference", "shadows", and reruns."""
    settings: tuple[str, ...] = ()
    """Settings of ``audit.reruns`` that it uses."""
    headline: bool = False
    """Whether it has a column in the first table."""
    fewest: int = 1
    """Members, and non-members, that it needs."""
    on_demand: bool = False
    """Whether it is run only if ``audit.attacks`` names it, although all it needs is there."""
    widening: float = 1.0
    """Factor of the deviations in its intervals and p-values; see :mod:`.crossfit`."""
    of_document: Callable[[Signals, AttackContext], Scores] | None = None
    """Function from a class's signals to its scores [n], for attacks that judge each document by itself."""
    of_classes: Callable[[Scores, Scores, int], PairOfScores] | None = None
    """Function from the features of members and non-members (:func:`.adaptive.features`) and a seed to both scores."""

    def __call__(self, target: Signals, context: AttackContext) -> Scores:
        """Return one score per document, higher = member.

        Raises:
            DataError: a document has no predicted token, or the context does not cover the documents.
        """
        assert self.of_document is not None
        target.require_tokens()
        return self.of_document(target, context)


ATTACKS: dict[str, Attack] = {}
"""All attacks by name, in the order in which :mod:`.registry` imports their modules."""


def attack(
    name: str,
    label: str,
    source: str,
    *,
    kind: Kind = "single_pass",
    needs: Sequence[str] = (),
    settings: Sequence[str] = (),
    headline: bool = False,
    on_demand: bool = False,
) -> Callable[[Callable[[Signals, AttackContext], Scores]], Callable[[Signals, AttackContext], Scores]]:
    """Enter a function of a class's signals as an attack; the fields of :class:`Attack` say what each argument is."""

    def enter(score: Callable[[Signals, AttackContext], Scores]) -> Callable[[Signals, AttackContext], Scores]:
        _enter(
            Attack(
                name,
                label,
                source,
                kind,
                frozenset(needs),
                tuple(settings),
                headline=headline,
                on_demand=on_demand,
                of_document=score,
            )
        )
        return score

    return enter


def attack_on_features(
    name: str, label: str, source: str, *, kind: Kind = "knows_defence", fewest: int = 1, widening: float = 1.0
) -> Callable[[Callable[[Scores, Scores, int], PairOfScores]], Callable[[Scores, Scores, int], PairOfScores]]:
    """Enter a function of the features of members and non-members as an attack."""

    def enter(score: Callable[[Scores, Scores, int], PairOfScores]) -> Callable[[Scores, Scores, int], PairOfScores]:
        needs = frozenset({"reference"})
        _enter(Attack(name, label, source, kind, needs, fewest=fewest, widening=widening, of_classes=score))
        return score

    return enter


def _enter(made: Attack) -> None:
    if made.name in ATTACKS:
        raise ValueError(f"two attacks are called {made.name!r}")
    ATTACKS[made.name] = made


def attack_of(score: str) -> Attack:
    """Return the attack behind a score's name: ``ref``, or ``ref@strong`` with the attacker's reference ``strong``."""
    name, _, reference = score.partition("@")
    made = ATTACKS[name]
    return replace(made, name=score, label=f"{made.label} ({reference})") if reference else made


def takes_references(made: Attack) -> bool:
    """Return whether an attack is run once for each of the attacker's references.

    Those that need shadow models or a pass of both models together are run with the first alone.
    """
    return "reference" in made.needs and made.kind in ("single_pass", "knows_defence")
