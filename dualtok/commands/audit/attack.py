"""From what the audit's runs of models left to its figures: attacks, canaries, and checks of the documents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.canaries.audit import audit_canaries
from dualtok.audit.report.data import AuditFigures
from dualtok.audit.report.details import AttackReference
from dualtok.audit.statistics.checks import check_audit
from dualtok.audit.statistics.evaluate import audit_model
from dualtok.audit.statistics.passages import PASSAGE_CHARACTERS
from dualtok.commands.audit.passes.canaries import KIND
from dualtok.commands.audit.passes.continuations import with_continuations
from dualtok.commands.audit.passes.reruns import RerunResults
from dualtok.commands.audit.text_jobs import MEMBERS, NON_MEMBERS
from dualtok.commands.audit.texts import attacker_frequencies, predicted_ids
from dualtok.commands.model_card import split_of_card, split_of_run
from dualtok.data.stream.documents import document_pieces
from dualtok.model.folder.weights import model_folder
from dualtok.reference.fingerprint import blocks_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.audit.report.data import Checks, ModelAudit
    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals
    from dualtok.audit.statistics.groups import DocumentGroups
    from dualtok.commands.audit.passes.canaries import CanarySource
    from dualtok.commands.audit.passes.continuations import Found
    from dualtok.commands.audit.passes.model_signals import Divergences
    from dualtok.commands.audit.shadow_signals import ShadowSignals
    from dualtok.commands.audit.texts import Pieces
    from dualtok.data.folder import DataFolder

    Texts = dict[str, dict[int, Pieces]]
    """Split -> document -> its tokens, piece by piece."""


@dataclass(frozen=True)
class Seen:
    """What the audit's runs of models left, on rank 0."""

    signals: dict[str, dict[str, Signals]]
    """Name of each model, and of the attacker's references -> split -> its signals."""
    divergences: dict[str, dict[str, Divergences]] = field(default_factory=dict)
    """Name of each model -> split -> document -> what the joint pass left, if it was made."""
    reruns: RerunResults = field(default_factory=RerunResults)
    shadows: ShadowSignals | None = None
    """What shadow models give to the documents."""
    canaries: CanarySource | None = None
    """Canaries among the members."""
    continuations: Found = field(default_factory=dict)
    """What models wrote after the beginnings of documents."""
    groups: DocumentGroups | None = None
    """Whose each document is."""


def attack_all(settings: AuditConfig, data: DataFolder, seen: Seen) -> AuditFigures:
    """Attack every model, on rank 0.

    Args:
        settings: with splits as members and non-members.
        data: the documents.
        seen: what the models' runs over them left.
    """
    signals = seen.signals
    attackers = [name for name in settings.references if name in signals]
    texts = _texts(settings, data, signals)
    contexts = {split: _context(split, settings, data, seen, texts[split]) for split in settings.splits}

    def known(name: str, split: str) -> AttackContext:
        context = replace(contexts[split], kl_from_reference=seen.divergences.get(name, {}).get(split))
        return seen.reruns.known(name, split, context)

    audits = [
        audit_model(
            name,
            *(signals[name][split] for split in settings.splits),
            member_context=known(name, settings.splits[0]),
            non_member_context=known(name, settings.splits[1]),
            config=settings,
            block_length=data.manifest.block_length,
            groups=seen.groups,
        )
        for name in settings.models
    ]
    audits = [with_continuations(model, seen.continuations, settings) for model in audits]
    if seen.canaries is not None:
        made_up, reference = seen.canaries.texts(), signals[attackers[0]][KIND] if attackers else None
        found = [audit_canaries(signals[model.name][KIND], made_up, settings, reference) for model in audits]
        audits = [model.model_copy(update={"canaries": one}) for model, one in zip(audits, found, strict=True)]
    return AuditFigures(
        settings=settings,
        models=audits,
        checks=_check(settings, data, audits, texts),
        references=[_strength(name, [signals[name][split] for split in settings.splits]) for name in attackers],
        prefix_documents=seen.reruns.prefixes,
    )


def _texts(settings: AuditConfig, data: DataFolder, signals: dict[str, dict[str, Signals]]) -> Texts:
    """Return the token ids of the audited documents."""
    audited = signals[next(iter(settings.models))]
    return {
        split: document_pieces(data.open(split, verify=False), audited[split].document, settings.batch_size)
        for split in settings.splits
    }


def _context(
    split: str, settings: AuditConfig, data: DataFolder, seen: Seen, pieces: dict[int, Pieces]
) -> AttackContext:
    """Return what the attacker has beside any model's signals over a split."""
    references = {name: seen.signals[name][split] for name in settings.references if name in seen.signals}
    first = next(iter(references), None)
    table = data.documents(split)
    return AttackContext(
        reference=None if first is None else references[first],
        further_references={name: own for name, own in references.items() if name != first},
        zlib_bytes=dict(zip(table["doc"].to_pylist(), table["zlib_bytes"].to_pylist(), strict=True)),
        token_ids=predicted_ids(pieces),
        frequencies=attacker_frequencies(data, settings) if "dc_pdd" in settings.attacks else None,
        shadows=None if seen.shadows is None else seen.shadows.fit(),
        learned={} if seen.shadows is None else seen.shadows.learn(),
    )


def _strength(name: str, sides: list[Signals]) -> AttackReference:
    """Return how well one of the attacker's references predicts members and non-members."""
    members, non_members = sides
    return AttackReference(
        name=name, perplexity_members=members.perplexity, perplexity_non_members=non_members.perplexity
    )


def _check(
    settings: AuditConfig, data: DataFolder, audits: list[ModelAudit], texts: dict[str, dict[int, Pieces]]
) -> Checks:
    """Look for differences between members and non-members that no model is needed to see."""
    members, non_members = (
        [_compared(pieces, masked=data.manifest.is_masked) for pieces in texts[split].values()]
        for split in settings.splits
    )
    table = data.documents(settings.splits[0])
    tokens_per_character = pc.sum(table["n_tokens"]).as_py() / pc.sum(table["n_characters"]).as_py()
    passage = max(1, round(PASSAGE_CHARACTERS * tokens_per_character))
    null = next((model for model in audits if model.name == settings.null_model), None)
    found = check_audit(members, non_members, passage_tokens=passage, null_model=null, seed=settings.seed)
    return found.model_copy(update={"unproven": _unproven(settings, data)})


def _compared(pieces: Pieces, *, masked: bool) -> NDArray[np.int64]:
    """Return the token ids by which a document is compared with others: of a conversation those that are trained, for
    many conversations share their instructions."""
    return np.concatenate([piece.ids[piece.predicted] if masked else piece.ids for piece in pieces])


def _unproven(settings: AuditConfig, data: DataFolder) -> dict[str, str]:
    """Return model -> why nothing shows that it was trained on the members, for the splits of prepared data.

    What shows it is the card of ``dualtok export``, or a training run of ``audit.runs`` that has the model's name.
    """
    if set(settings.splits) == {MEMBERS, NON_MEMBERS}:
        return {}  # lists of texts: whoever gives them says so
    blocks = blocks_digest(data.manifest)
    found = {}
    for name, path in settings.models.items():
        if name == settings.null_model:
            continue
        split = split_of_card(model_folder(path), blocks)
        run = settings.runs.get(name)
        split = split or (None if run is None else split_of_run(Path(run), blocks))
        if split is None:
            found[name] = "neither its card nor a run of audit.runs says that it has learned these data"
        elif split != settings.members:
            found[name] = f"it has learned the split {split!r}, not {settings.members!r}"
    return found
