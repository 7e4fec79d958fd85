"""``dualtok audit``: run every model once over members and non-members, attack what it gives away, keep the figures.

The model passes are shared by all ranks and what they left is kept, so that an interrupted audit continues with the
next model and attacks can be run again without a model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from rich.console import Console

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.report.data import AuditFigures
from dualtok.audit.report.details import AttackReference
from dualtok.audit.report.scope import weak_references
from dualtok.audit.report.tables import (
    adaptive_table,
    bound_table,
    canary_table,
    collection_table,
    comparison_table,
    regurgitation_table,
    rerun_table,
    token_table,
)
from dualtok.audit.settings import TextSource
from dualtok.audit.statistics.canaries import audit_canaries
from dualtok.audit.statistics.checks import check_audit
from dualtok.audit.statistics.evaluate import audit_model
from dualtok.audit.statistics.passages import PASSAGE_CHARACTERS
from dualtok.commands.audit.attackers import train_references
from dualtok.commands.audit.canaries import KIND, open_canaries
from dualtok.commands.audit.continuations import choose_samples, continue_models, with_continuations
from dualtok.commands.audit.model_signals import ModelPasses
from dualtok.commands.audit.reruns import rerun_models
from dualtok.commands.audit.shadow_signals import ShadowSignals
from dualtok.commands.audit.shadows import train_shadows
from dualtok.commands.audit.text_jobs import MEMBERS, NON_MEMBERS, Job, read_texts, text_jobs
from dualtok.commands.audit.texts import attacker_frequencies, predicted_ids
from dualtok.commands.audit.whole_model import whole_model
from dualtok.commands.model_card import split_of_card, split_of_run
from dualtok.data.folder import DataFolder
from dualtok.data.stream.documents import document_pieces
from dualtok.distributed.ranks import join_ranks
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.model.check import check_model
from dualtok.model.folder.weights import model_folder
from dualtok.reference.fingerprint import blocks_digest
from dualtok.versions import code_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dualtok.audit.report.data import Checks, ModelAudit
    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals
    from dualtok.commands.audit.canaries import CanarySource
    from dualtok.commands.audit.continuations import Found
    from dualtok.commands.audit.model_signals import Divergences
    from dualtok.commands.audit.reruns import RerunResults
    from dualtok.commands.audit.texts import Pieces
    from dualtok.config.run import RunConfig
    from dualtok.distributed.ranks import Ranks

AUDIT_FILE = "audit.json"
TABLE_WIDTH = 120
TABLES = (
    comparison_table,
    token_table,
    rerun_table,
    adaptive_table,
    collection_table,
    regurgitation_table,
    canary_table,
    bound_table,
)


def audit(run: RunConfig, *, processes: int = 1) -> AuditFigures:
    """Audit every model of ``audit.models`` and write ``<output_dir>/audit/audit.json``.

    On ranks other than the first the figures are the same.

    Args:
        run: settings with ``audit.models``.
        processes: ranks that share the training of each of ``audit.shadows``.

    Raises:
        ConfigError: no models are named, or one does not fit the blocks; or shadow models cannot be trained.
        DataError: a shard is missing or altered, or a class has no documents.
    """
    settings = run.audit
    if not settings.models:
        raise ConfigError("audit.models: name at least one model folder to audit, e.g. {dual: models/dual}")
    kept = audit_folder(run.output_dir)
    # Models are trained before this process joins others or touches a device: training has processes of its own.
    references = train_references(run, kept, processes)
    ranks = join_ranks() if settings.shadows is None else None
    folders = _folders(settings, references, kept, ranks)
    if settings.of_texts:
        assert ranks is not None
        jobs = ranks.first_does(lambda: _jobs_of_texts(settings, folders, set(references), kept))
    else:
        jobs = [Job(settings, DataFolder.of_run(run.data), folders)]
    for job in jobs:
        _check_models(job.settings, job.data, job.folders)
    shadows = train_shadows(run, jobs[0].data, kept / "shadows", processes) if settings.shadows is not None else []
    ranks = ranks or join_ranks()
    parts = [_audit_job(job, kept, ranks, shadows, run.seed) for job in jobs]

    def write() -> AuditFigures:
        figures = _together(settings, parts)
        write_text(kept / AUDIT_FILE, figures.model_dump_json(indent=1))
        return figures

    written: AuditFigures = ranks.first_does(write)
    ranks.barrier()
    return written


def _folders(settings: AuditConfig, references: dict[str, str], kept: Path, ranks: Ranks | None) -> dict[str, Path]:
    """Return the folder of every model and of the attacker's references, those with adapters merged."""

    def found() -> dict[str, Path]:
        def whole(path: str, adapter: str | None = None) -> Path:
            return whole_model(
                path, adapter, settings.base, kept / "merged", trust_remote_code=settings.trust_remote_code
            )

        folders = {name: whole(path, settings.adapters.get(name)) for name, path in settings.models.items()}
        return folders | {name: whole(path) for name, path in references.items()}

    return found() if ranks is None else dict(ranks.first_does(found))


def _jobs_of_texts(settings: AuditConfig, folders: dict[str, Path], references: set[str], kept: Path) -> list[Job]:
    assert isinstance(settings.members, TextSource)
    assert isinstance(settings.non_members, TextSource)
    lists = {
        MEMBERS: read_texts(settings.members, "audit.members"),
        NON_MEMBERS: read_texts(settings.non_members, "audit.non_members"),
    }
    return text_jobs(settings, lists, folders, references, kept / "texts")


def _together(settings: AuditConfig, parts: list[AuditFigures]) -> AuditFigures:
    """Return the figures of all jobs as one audit's, with its own settings and in the order of its models."""
    rows = {model.name: model for part in parts for model in part.models}
    whole = parts[0].model_copy(update={"settings": settings, "models": [rows[name] for name in settings.models]})
    with_null = next((part for part in parts if part.checks is not None and part.checks.null_model), parts[0])
    hashes = {key: digest for part in parts for key, digest in part.hashes.items()}
    return whole.model_copy(update={"checks": with_null.checks, "hashes": hashes})


def _audit_job(job: Job, kept: Path, ranks: Ranks, shadows: list[Path], seed: int) -> AuditFigures:
    """Audit models that read the same blocks."""
    settings, data, folders = job.settings, job.data, job.folders
    canaries = ranks.together(lambda: open_canaries(settings, data))
    models = ModelPasses(settings, data, kept / "signals", ranks, canaries)
    samples = ranks.together(lambda: choose_samples(settings, data, models.left_out))

    def key_of(folder: Path) -> str:
        key: str = ranks.first_does(lambda: models.key(folder))
        return key

    keys = {name: key_of(folder) for name, folder in folders.items()}
    signals = {
        name: models.signals(name, folder, keys[name], attacker=name not in settings.models)
        for name, folder in folders.items()
    }
    attacker = _compared(settings, folders)
    divergences = {
        name: models.divergences(name, folders[name], folders[attacker], (keys[name], keys[attacker]))
        for name in settings.models
        if attacker is not None
    }
    audited = {name: folders[name] for name in settings.models}
    reruns = rerun_models(settings, data, audited, ranks, kept / "reruns", keys=keys, left_out=models.left_out)
    written = continue_models(samples, settings, data, audited, ranks=ranks, kept=kept / "continuations", keys=keys)
    first = next((name for name in settings.references if name in signals), None)
    of_shadows = ShadowSignals(settings, seed, None if first is None else signals[first])
    for number, folder in enumerate(shadows):
        of_shadows.add(number, models.signals(f"shadow {number}", folder, key_of(folder), with_canaries=False))

    def attack() -> AuditFigures:
        found = reruns.without_prefixes(signals)
        hashes = _hashes(settings, data, {name: models.digests[folder] for name, folder in folders.items()})
        attacked = attack_all(
            settings,
            data,
            found,
            divergences=divergences,
            reruns=reruns,
            of_shadows=of_shadows,
            canaries=canaries,
            written=written,
        )
        return attacked.model_copy(update={"hashes": hashes})

    figures: AuditFigures = ranks.first_does(attack)
    return figures


def print_figures(figures: AuditFigures) -> None:
    """Print the tables and warnings; where there is no terminal, as wide as they need to be."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    for table in TABLES:
        if (lines := table(figures.models)).row_count:
            console.print(lines)
    checks = figures.checks
    for warning in checks.warnings if checks is not None else ():
        console.print(f"warning: {warning}", markup=False)
    for name, reason in checks.unproven.items() if checks is not None else ():
        console.print(f"warning: nothing shows that {name!r} was trained on the members: {reason}", markup=False)
    for name in weak_references(figures.models, figures.references):
        console.print(
            f"note: {name!r} predicts other texts clearly better than the attacker's best reference: a stronger "
            "reference may find more, so that the figures of attacks with one are a lower bound",
            markup=False,
        )


def audit_folder(output_dir: str) -> Path:
    """Return where a run's audit is kept."""
    return Path(output_dir) / "audit"


def _check_models(settings: AuditConfig, data: DataFolder, folders: dict[str, Path]) -> None:
    """Raise ConfigError if a model is not whole, does not fit the blocks, or cannot be compared with the attacker's."""
    logits = {}
    for name, folder in folders.items():
        config = check_model(
            folder,
            data,
            origin=f"audit: {name} ({folder})",
            trust_remote_code=settings.trust_remote_code,
            setting="audit.trust_remote_code",
        )
        logits[name] = config.get_text_config().vocab_size
    attacker = _compared(settings, folders)
    differ = [name for name in settings.models if attacker is not None and logits[name] != logits[attacker]]
    if differ and attacker is not None:
        raise ConfigError(
            f"audit.models: {differ[0]!r} has {logits[differ[0]]} logits and the attacker's reference "
            f"{logits[attacker]}, so that their distributions cannot be compared; leave info_rmia out of audit.attacks"
        )


def _compared(settings: AuditConfig, folders: Iterable[str]) -> str | None:
    """Return the reference that every model is to be run beside, the first there is; None if no attack wants that."""
    if "info_rmia" not in settings.attacks:
        return None
    return next((name for name in settings.references if name in folders), None)


def attack_all(
    settings: AuditConfig,
    data: DataFolder,
    signals: dict[str, dict[str, Signals]],
    *,
    divergences: dict[str, dict[str, Divergences]],
    reruns: RerunResults,
    of_shadows: ShadowSignals | None = None,
    canaries: CanarySource | None = None,
    written: Found | None = None,
) -> AuditFigures:
    """Attack every model, on rank 0.

    Args:
        settings: with splits as members and non-members.
        data: the documents.
        signals: name of each model, and of the attacker's reference -> split -> its signals.
        divergences: name of each model -> split -> document -> what the joint pass left, if it was made.
        reruns: what the reruns left.
        of_shadows: what shadow models give to the documents.
        canaries: canaries among the members.
        written: what models wrote after the beginnings of documents.
    """
    contexts: dict[str, AttackContext] = {}
    texts: dict[str, dict[int, Pieces]] = {}
    frequencies = attacker_frequencies(data, settings) if "dc_pdd" in settings.attacks else None
    audited = next(iter(settings.models))
    attackers = [name for name in settings.references if name in signals]
    of_shadows = of_shadows or ShadowSignals(settings, 0, None)
    fit, learned = of_shadows.fit(), of_shadows.learn()
    for split in settings.splits:
        stream = data.open(split, verify=False)
        texts[split] = document_pieces(stream, signals[audited][split].document, settings.batch_size)
        table = data.documents(split)
        sizes = dict(zip(table["doc"].to_pylist(), table["zlib_bytes"].to_pylist(), strict=True))
        contexts[split] = AttackContext(
            reference=signals[attackers[0]][split] if attackers else None,
            further_references={name: signals[name][split] for name in attackers[1:]},
            zlib_bytes=sizes,
            token_ids=predicted_ids(texts[split]),
            frequencies=frequencies,
            shadows=fit,
            learned=learned,
        )

    def known(name: str, split: str) -> AttackContext:
        context = replace(contexts[split], kl_from_reference=divergences.get(name, {}).get(split))
        return reruns.known(name, split, context)

    audits = [
        audit_model(
            name,
            *(signals[name][split] for split in settings.splits),
            member_context=known(name, settings.splits[0]),
            non_member_context=known(name, settings.splits[1]),
            config=settings,
            block_length=data.manifest.block_length,
        )
        for name in settings.models
    ]
    audits = [with_continuations(model, written or {}, settings) for model in audits]
    if canaries is not None:
        made_up, reference = canaries.texts(), signals[attackers[0]][KIND] if attackers else None
        found = [audit_canaries(signals[model.name][KIND], made_up, settings, reference) for model in audits]
        audits = [model.model_copy(update={"canaries": one}) for model, one in zip(audits, found, strict=True)]
    return AuditFigures(
        settings=settings,
        models=audits,
        checks=_check(settings, data, audits, texts),
        references=[_strength(name, [signals[name][split] for split in settings.splits]) for name in attackers],
        prefix_documents=reruns.prefixes,
    )


def _strength(name: str, sides: list[Signals]) -> AttackReference:
    """Return how well one of the attacker's references predicts members and non-members."""
    members, non_members = sides
    return AttackReference(
        name=name, perplexity_members=members.perplexity, perplexity_non_members=non_members.perplexity
    )


def _hashes(settings: AuditConfig, data: DataFolder, weights: dict[str, str]) -> dict[str, str]:
    """Return the digests of all that an audit's figures depend on, for the report."""
    names = {name: f"model {name}" if name in settings.models else f"attacker's {name}" for name in weights}
    models = {names[name]: digest for name, digest in weights.items()}
    return {"data": blocks_digest(data.manifest), "code": code_digest(), **models}


def _check(
    settings: AuditConfig, data: DataFolder, audits: list[ModelAudit], texts: dict[str, dict[int, Pieces]]
) -> Checks:
    """Look for differences between members and non-members that no model is needed to see."""
    members, non_members = ([np.concatenate(pieces) for pieces in texts[split].values()] for split in settings.splits)
    table = data.documents(settings.splits[0])
    tokens_per_character = pc.sum(table["n_tokens"]).as_py() / pc.sum(table["n_characters"]).as_py()
    passage = max(1, round(PASSAGE_CHARACTERS * tokens_per_character))
    null = next((model for model in audits if model.name == settings.null_model), None)
    found = check_audit(members, non_members, passage_tokens=passage, null_model=null, seed=settings.seed)
    return found.model_copy(update={"unproven": _unproven(settings, data)})


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
            found[name] = f"neither its card nor a run of audit.runs says that it learned {data}"
        elif split != settings.members:
            found[name] = f"it has learned the split {split!r}, not {settings.members!r}"
    return found
