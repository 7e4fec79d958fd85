"""``dualtok audit``: run every model once over members and non-members, attack what it gives away, keep the figures.

The model passes are shared by all ranks and what they left is kept, so that an interrupted audit continues with the
next model and attacks can be run again without a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dualtok.audit.report.scope import weak_references
from dualtok.audit.report.tables import (
    adaptive_table,
    bound_table,
    canary_table,
    collection_table,
    comparison_table,
    group_table,
    reference_tables,
    regurgitation_table,
    rerun_table,
    token_table,
)
from dualtok.audit.report.verdict import verdict_of
from dualtok.audit.settings import ATTACKER, TextSource
from dualtok.commands.audit.attack import Seen, attack_all
from dualtok.commands.audit.attackers import train_references
from dualtok.commands.audit.groups import check_groups, document_groups
from dualtok.commands.audit.passes.canaries import open_canaries
from dualtok.commands.audit.passes.continuations import choose_samples, continue_models
from dualtok.commands.audit.passes.model_signals import ModelPasses
from dualtok.commands.audit.passes.reruns import rerun_models
from dualtok.commands.audit.shadow_signals import ShadowSignals
from dualtok.commands.audit.shadows import train_shadows
from dualtok.commands.audit.text_jobs import MEMBERS, NON_MEMBERS, Job, read_texts, text_jobs
from dualtok.commands.audit.whole_model import whole_model
from dualtok.commands.output import AUDIT_FILE, audit_folder
from dualtok.data.folder import DataFolder
from dualtok.distributed.ranks import join_ranks
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.model.check import check_model
from dualtok.reference.fingerprint import blocks_digest
from dualtok.versions import code_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dualtok.audit.report.data import AuditFigures
    from dualtok.audit.settings import AuditConfig
    from dualtok.config.run import RunConfig
    from dualtok.distributed.ranks import Ranks

TABLE_WIDTH = 120
TABLES = (
    comparison_table,
    token_table,
    rerun_table,
    adaptive_table,
    collection_table,
    group_table,
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
        ConfigError: no models are named, or one does not fit the blocks; or shadow models cannot be trained; or the
            data was prepared without the groups of ``audit.group_field``.
        DataError: a shard is missing or altered, or a class has no documents; or a group is on both sides, or there
            are too few.
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
        MEMBERS: read_texts(settings.members, "audit.members", settings.group_field),
        NON_MEMBERS: read_texts(settings.non_members, "audit.non_members", settings.group_field),
    }
    return text_jobs(settings, lists, folders, references, kept / "texts")


def _together(settings: AuditConfig, parts: list[AuditFigures]) -> AuditFigures:
    """Return the figures of all jobs as one audit's, with its own settings and in the order of its models."""
    rows = {model.name: model for part in parts for model in part.models}
    whole = parts[0].model_copy(update={"settings": settings, "models": [rows[name] for name in settings.models]})
    with_null = next((part for part in parts if part.checks is not None and part.checks.null_model), parts[0])
    hashes = {key: digest for part in parts for key, digest in part.hashes.items()}
    references = list({reference.name: reference for part in parts for reference in part.references}.values())
    return whole.model_copy(update={"checks": with_null.checks, "hashes": hashes, "references": references})


def _audit_job(job: Job, kept: Path, ranks: Ranks, shadows: list[Path], seed: int) -> AuditFigures:
    """Audit models that read the same blocks."""
    settings, data, folders = job.settings, job.data, job.folders
    canaries = ranks.together(lambda: open_canaries(settings, data))
    models = ModelPasses(settings, data, kept / "signals", ranks, canaries)
    samples = ranks.together(lambda: choose_samples(settings, data, models.left_out))
    ranks.together(lambda: check_groups(settings, data, models.left_out))

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
        seen = Seen(found, divergences, reruns, of_shadows, canaries, written, document_groups(settings, data, kept))
        attacked = attack_all(settings, data, seen)
        return attacked.model_copy(update={"hashes": hashes})

    figures: AuditFigures = ranks.first_does(attack)
    return figures


def print_figures(figures: AuditFigures) -> None:
    """Print the tables, the warnings and a sentence per model; without a terminal, as wide as they need to be."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    every = [table(figures.models) for table in TABLES]
    for lines in (*(table for table in every if table.row_count), *reference_tables(figures.models)):
        caption, lines.caption = lines.caption, None  # below a narrow table it would be a column of words
        console.print(lines)
        console.print(caption, markup=False, style="dim")
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
    for model in figures.models:
        console.print(f"{model.name}: {verdict_of(model, checks).sentence}", markup=False, style="bold")


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


def _hashes(settings: AuditConfig, data: DataFolder, weights: dict[str, str]) -> dict[str, str]:
    """Return the digests of all that an audit's figures depend on, for the report."""
    attackers = {name: f"attacker's reference {name}" for name in settings.references}
    names = attackers | {ATTACKER: "attacker's reference"} | {name: f"model {name}" for name in settings.models}
    models = {names[name]: digest for name, digest in weights.items()}
    return {"data": blocks_digest(data.manifest), "code": code_digest(), **models}
