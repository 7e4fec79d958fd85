"""From the signals of one model to its row of the report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import AttackContext, attack_of
from dualtok.audit.attacks.crossfit import FEWEST
from dualtok.audit.attacks.registry import compare
from dualtok.audit.report.data import Collections, ModelAudit
from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.checks import strongest_p_value
from dualtok.audit.statistics.collection import collection_tests, holm, learned_scores
from dualtok.audit.statistics.power import audit_power
from dualtok.audit.statistics.regurgitation import ClassPassages, audit_regurgitation
from dualtok.audit.statistics.results import attack_outcomes, strongest, strongest_tpr
from dualtok.audit.statistics.summary import CALIBRATED_EDGES, ClassSummary, calibrated_histogram
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.registry import Scored
    from dualtok.audit.signals.signals import Signals
    from dualtok.audit.statistics.groups import DocumentGroups

    Part = tuple[Signals, AttackContext]
    """Some documents of a class, and what the attacker has beside them."""

__all__ = ["CALIBRATED_EDGES", "audit_model", "audit_parts", "choose_documents"]


def choose_documents(documents: Sequence[int] | NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return at most ``limit`` of the ids, ascending: a uniform sample that the set of ids and the seed decide."""
    pool = np.unique(np.asarray(documents, dtype=np.int64))
    if limit is None or len(pool) <= limit:
        return pool
    return np.sort(np.random.default_rng(seed).choice(pool, size=limit, replace=False))


def audit_model(
    name: str,
    members: Signals,
    non_members: Signals,
    *,
    member_context: AttackContext | None = None,
    non_member_context: AttackContext | None = None,
    config: AuditConfig | None = None,
    step: int | None = None,
    block_length: int | None = None,
    groups: DocumentGroups | None = None,
) -> ModelAudit:
    """Run every attack of ``config`` on one model and state what it gives away.

    Args:
        name: the row's name in the report, e.g. "plain, last".
        members: the model's signals over documents it was trained on.
        non_members: the same over documents of the same distribution that it was not trained on.
        member_context: what the attacker has for the members; an attack is run if both contexts have what it needs.
        non_member_context: the same for the non-members.
        config: settings; its ``min_k_share`` and ``con_recall_gamma`` take the place of the contexts'.
        step: training step of the model, if it is one of several.
        block_length: tokens after which longer documents were cut, so that no passage reaches over a cut.
        groups: whose each document is, for ``config.group_field``.

    Raises:
        DataError: no document of a class can be scored, a context does not fit the documents, or groups cannot be
            audited (:func:`.groups.require_groups`).
    """
    whole = [(members, member_context or AttackContext())], [(non_members, non_member_context or AttackContext())]
    return audit_parts(name, *whole, config=config, step=step, block_length=block_length, groups=groups)


def audit_parts(
    name: str,
    members: Iterable[Part],
    non_members: Iterable[Part],
    *,
    config: AuditConfig | None = None,
    step: int | None = None,
    block_length: int | None = None,
    groups: DocumentGroups | None = None,
) -> ModelAudit:
    """Do what :func:`audit_model` does with signals that come in parts, of which one at a time is in memory.

    Args:
        name: the row's name in the report.
        members: signals of documents that the model was trained on, each part with what the attacker has beside them;
            :func:`.summary.streamed_parts` reads them from files.
        non_members: the same over documents that it was not trained on.
        config: settings; its ``min_k_share`` and ``con_recall_gamma`` take the place of the contexts'.
        step: training step of the model, if it is one of several.
        block_length: tokens after which longer documents were cut, so that no passage reaches over a cut.
        groups: whose each document is, for ``config.group_field``.

    Raises:
        DataError: no document of a class can be scored, a context does not fit the documents, or a part lacks what the
            first of its class had.
    """
    config = config or AuditConfig()
    classes = ClassSummary(config, block_length), ClassSummary(config, block_length)
    for summary, parts, kind in zip(classes, (members, non_members), ("members", "non-members"), strict=True):
        for signals, context in parts:
            summary.add(signals, _with_settings(context, config))
        if summary.documents == 0:
            raise DataError(f"audit of {name!r}: no {kind} with at least two tokens; give more or longer documents")
    return _audit(name, step, classes, config, groups)


def _audit(
    name: str,
    step: int | None,
    classes: tuple[ClassSummary, ClassSummary],
    config: AuditConfig,
    groups: DocumentGroups | None,
) -> ModelAudit:
    """State what the scores of all documents say."""
    contexts = classes[0].context or AttackContext(), classes[1].context or AttackContext()
    enough = min(summary.documents for summary in classes)
    judged = classes[0].judged(), classes[1].judged()
    scored = compare(judged, contexts, config.attacks, config.seed, enough=enough)
    scores = scored.scores
    if not scores:
        raise DataError(f"audit of {name!r}: none of the attacks {list(config.attacks)} can run; add 'loss'")
    outcomes = attack_outcomes(scores, config)
    widening = {attack: attack_of(attack).widening for attack in scores}
    has_reference = "reference" in contexts[0].has & contexts[1].has
    return ModelAudit(
        name=name,
        step=step,
        n_members=classes[0].documents,
        n_non_members=classes[1].documents,
        members_left_out=classes[0].left_out,
        non_members_left_out=classes[1].left_out,
        perplexity_members=classes[0].perplexity,
        perplexity_non_members=classes[1].perplexity,
        loss_gap=classes[1].mean_loss - classes[0].mean_loss,
        attacks=[outcome.result for outcome in outcomes],
        not_run=scored.not_run,
        strongest=strongest(outcomes),
        strongest_tpr=strongest_tpr(outcomes),
        strongest_p_value=strongest_p_value(
            scores, permutations=config.permutations, seed=config.seed, widening=widening
        ),
        power=audit_power(scores, widening, confidence=config.confidence, seed=config.seed),
        collections=_collections(scored, config),
        calibrated=calibrated_histogram(*classes) if has_reference else None,
        regurgitation=audit_regurgitation(
            ClassPassages.joined(classes[0].passages), ClassPassages.joined(classes[1].passages), config
        ),
        groups=None if groups is None else groups.audit(scores, (classes[0].ids(), classes[1].ids()), config),
    )


def _with_settings(context: AttackContext, config: AuditConfig) -> AttackContext:
    """Return a context with the settings' shares in place of its own."""
    return dataclasses.replace(context, min_k_share=config.min_k_share, con_recall_gamma=config.reruns.con_recall_gamma)


def _collections(scored: Scored, config: AuditConfig) -> list[Collections]:
    """Test collections by the Ref attack (or the first there is), and by what was learned on half of the documents."""
    name = "ref" if "ref" in scored.scores else next(iter(scored.scores))
    named = {attack_of(name).label: scored.scores[name]}
    if min(map(len, scored.features)) >= FEWEST:
        named["learned"] = learned_scores(*scored.features, config.seed)
    found = [
        (label, test)
        for label, pair in named.items()
        for test in collection_tests(*pair, config.collections, config.seed)
    ]
    together = holm([test.p_value for _, test in found])
    return [
        Collections(label=label, p_holm=p_holm, **dataclasses.asdict(test))
        for (label, test), p_holm in zip(found, together, strict=True)
    ]
