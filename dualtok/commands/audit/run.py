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
from dualtok.audit.report.tables import (
    adaptive_table,
    canary_table,
    collection_table,
    comparison_table,
    rerun_table,
    token_table,
)
from dualtok.audit.statistics.canaries import audit_canaries
from dualtok.audit.statistics.checks import check_audit
from dualtok.audit.statistics.evaluate import audit_model
from dualtok.audit.statistics.passages import PASSAGE_CHARACTERS
from dualtok.commands.audit.canaries import KIND, open_canaries
from dualtok.commands.audit.model_signals import ModelPasses
from dualtok.commands.audit.reruns import rerun_models
from dualtok.commands.audit.shadows import document_losses, fit_losses, train_shadows
from dualtok.commands.audit.texts import attacker_frequencies, predicted_ids
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
    from dualtok.audit.attacks.base import ShadowFit
    from dualtok.audit.report.data import Checks, ModelAudit
    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.signals import Signals
    from dualtok.commands.audit.canaries import CanarySource
    from dualtok.commands.audit.model_signals import Divergences
    from dualtok.commands.audit.reruns import RerunResults
    from dualtok.commands.audit.texts import Pieces
    from dualtok.config.run import RunConfig

ATTACKER = "attack_reference"
AUDIT_FILE = "audit.json"
TABLE_WIDTH = 120
TABLES = (comparison_table, token_table, rerun_table, adaptive_table, collection_table, canary_table)


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
    folders = {name: model_folder(path) for name, path in settings.models.items()}
    if settings.attack_reference is not None:
        folders[ATTACKER] = model_folder(settings.attack_reference)
    data = DataFolder.of_run(run.data)
    _check_models(settings, data, folders)
    # Before this process joins others or touches a device: training has processes of its own.
    kept = audit_folder(run.output_dir)
    shadows = train_shadows(run, data, kept / "shadows", processes) if settings.shadows is not None else []
    ranks = join_ranks()
    canaries = ranks.together(lambda: open_canaries(settings, data))
    models = ModelPasses(settings, data, kept / "signals", ranks, canaries)

    def key_of(folder: Path) -> str:
        key: str = ranks.first_does(lambda: models.key(folder))
        return key

    keys = {name: key_of(folder) for name, folder in folders.items()}
    signals = {
        name: models.signals(name, folder, keys[name], attacker=name == ATTACKER) for name, folder in folders.items()
    }
    divergences = {
        name: models.divergences(name, folders[name], folders[ATTACKER], (keys[name], keys[ATTACKER]))
        for name in settings.models
        if _compares(settings)
    }
    audited = {name: folders[name] for name in settings.models}
    reruns = rerun_models(settings, data, audited, ranks, kept / "reruns", keys=keys, left_out=models.left_out)
    of_shadows = [
        document_losses(models.signals(f"shadow {number}", folder, key_of(folder), with_canaries=False).values())
        for number, folder in enumerate(shadows)
    ]

    def attack() -> AuditFigures:
        fit = fit_losses(of_shadows, run.seed) if of_shadows else None
        found = reruns.without_prefixes(signals)
        hashes = _hashes(data, {name: models.digests[folder] for name, folder in folders.items()})
        return _attack_all(
            run, data, found, divergences=divergences, reruns=reruns, fit=fit, canaries=canaries, hashes=hashes
        )

    figures: AuditFigures = ranks.first_does(attack)
    ranks.barrier()
    return figures


def print_figures(figures: AuditFigures) -> None:
    """Print the tables and warnings; where there is no terminal, as wide as they need to be."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    for table in TABLES:
        if (lines := table(figures.models)).row_count:
            console.print(lines)
    for warning in figures.checks.warnings if figures.checks is not None else ():
        console.print(f"warning: {warning}", markup=False)


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
    differ = [name for name in folders if _compares(settings) and logits[name] != logits[ATTACKER]]
    if differ:
        raise ConfigError(
            f"audit.models: {differ[0]!r} has {logits[differ[0]]} logits and the attacker's reference "
            f"{logits[ATTACKER]}, so that their distributions cannot be compared; leave info_rmia out of audit.attacks"
        )


def _compares(settings: AuditConfig) -> bool:
    """Return whether every model is to be run beside the attacker's reference."""
    return "info_rmia" in settings.attacks and settings.attack_reference is not None


def _attack_all(
    run: RunConfig,
    data: DataFolder,
    signals: dict[str, dict[str, Signals]],
    *,
    divergences: dict[str, dict[str, Divergences]],
    reruns: RerunResults,
    fit: ShadowFit | None,
    canaries: CanarySource | None,
    hashes: dict[str, str],
) -> AuditFigures:
    """Attack every model (on rank 0) and write the figures."""
    settings = run.audit
    contexts: dict[str, AttackContext] = {}
    texts: dict[str, dict[int, Pieces]] = {}
    frequencies = attacker_frequencies(data, settings) if "dc_pdd" in settings.attacks else None
    audited = next(iter(settings.models))
    for split in (settings.members, settings.non_members):
        stream = data.open(split, verify=False)
        texts[split] = document_pieces(stream, signals[audited][split].document, settings.batch_size)
        table = data.documents(split)
        sizes = dict(zip(table["doc"].to_pylist(), table["zlib_bytes"].to_pylist(), strict=True))
        contexts[split] = AttackContext(
            reference=signals[ATTACKER][split] if ATTACKER in signals else None,
            zlib_bytes=sizes,
            token_ids=predicted_ids(texts[split]),
            frequencies=frequencies,
            shadows=fit,
        )

    def known(name: str, split: str) -> AttackContext:
        context = replace(contexts[split], kl_from_reference=divergences.get(name, {}).get(split))
        return reruns.known(name, split, context)

    audits = [
        audit_model(
            name,
            signals[name][settings.members],
            signals[name][settings.non_members],
            member_context=known(name, settings.members),
            non_member_context=known(name, settings.non_members),
            config=settings,
        )
        for name in settings.models
    ]
    if canaries is not None:
        made_up, reference = canaries.texts(), signals.get(ATTACKER, {}).get(KIND)
        found = [audit_canaries(signals[model.name][KIND], made_up, settings, reference) for model in audits]
        audits = [model.model_copy(update={"canaries": one}) for model, one in zip(audits, found, strict=True)]
    figures = AuditFigures(
        settings=settings,
        models=audits,
        checks=_check(settings, data, audits, texts),
        prefix_documents=reruns.prefixes,
        hashes=hashes,
    )
    write_text(audit_folder(run.output_dir) / AUDIT_FILE, figures.model_dump_json(indent=1))
    return figures


def _hashes(data: DataFolder, weights: dict[str, str]) -> dict[str, str]:
    """Return the digests of all that an audit's figures depend on, for the report."""
    models = {
        ("attacker's reference" if name == ATTACKER else f"model {name}"): digest for name, digest in weights.items()
    }
    return {"data": blocks_digest(data.manifest), "code": code_digest(), **models}


def _check(
    settings: AuditConfig, data: DataFolder, audits: list[ModelAudit], texts: dict[str, dict[int, Pieces]]
) -> Checks:
    """Look for differences between members and non-members that no model is needed to see."""
    members, non_members = (
        [np.concatenate(pieces) for pieces in texts[split].values()]
        for split in (settings.members, settings.non_members)
    )
    table = data.documents(settings.members)
    tokens_per_character = pc.sum(table["n_tokens"]).as_py() / pc.sum(table["n_characters"]).as_py()
    passage = max(1, round(PASSAGE_CHARACTERS * tokens_per_character))
    null = next((model for model in audits if model.name == settings.null_model), None)
    return check_audit(members, non_members, passage_tokens=passage, null_model=null, seed=settings.seed)
