"""``dualtok audit``: run every model once over members and non-members, attack what it gives away, keep the figures.

The model pass is shared by all ranks and its signals are kept, so that an interrupted audit continues with the next
model and attacks can be run again without a model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from rich.console import Console

from dualtok.audit.attacks import AttackContext
from dualtok.audit.canaries import audit_canaries
from dualtok.audit.checks import PASSAGE_CHARACTERS, check_audit
from dualtok.audit.evaluate import audit_model, choose_documents
from dualtok.audit.report_data import AuditFigures
from dualtok.audit.signals import Piece, Signals, SignalsBuilder, token_signals
from dualtok.audit.table import adaptive_table, canary_table, collection_table, comparison_table, further_table
from dualtok.data.manifest import load_manifest
from dualtok.data.remote import prepared
from dualtok.data.stream import BlockStream
from dualtok.data.subset import token_ids
from dualtok.data.tokenizer import load_data_tokenizer
from dualtok.engine.distributed import Ranks, join_ranks
from dualtok.engine.zero import build_forward_only
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.jobs.audit_passes import further_passes
from dualtok.jobs.canaries import KIND, canary_pass, open_canaries
from dualtok.jobs.shadows import document_losses, fit_losses, train_shadows
from dualtok.model.load import check_fits, read_model_config
from dualtok.model.weights import model_folder
from dualtok.monitor.progress import RunProgress
from dualtok.reference.fingerprint import blocks_digest, weights_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dualtok.audit.report_data import Checks, ModelAudit
    from dualtok.data.manifest import Manifest
    from dualtok.data.packing import Segment
    from dualtok.jobs.audit_passes import FurtherPasses
    from dualtok.jobs.canaries import CanarySource
    from dualtok.jobs.shadows import DocumentLosses
    from dualtok.run import RunConfig

ATTACKER = "attack_reference"
AUDIT_FILE = "audit.json"
TABLE_WIDTH = 120


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
    place = prepared(run.data)
    manifest = load_manifest(place)
    folders = {name: model_folder(path) for name, path in settings.models.items()}
    if settings.attack_reference is not None:
        folders[ATTACKER] = model_folder(settings.attack_reference)
    vocabulary = len(load_data_tokenizer(place, manifest))
    for name, folder in folders.items():
        config = read_model_config(
            folder, trust_remote_code=settings.trust_remote_code, setting="audit.trust_remote_code"
        )
        check_fits(config, vocabulary=vocabulary, block_length=manifest.block_length, origin=f"audit: {name}")
    # Before this process joins others or touches a device: training has processes of its own.
    shadows = train_shadows(run, audit_folder(run) / "shadows", processes) if settings.shadows is not None else []
    ranks = join_ranks()
    canaries = ranks.together(lambda: open_canaries(run, manifest))
    signals = {
        name: _signals_of(run, manifest, name, folder, ranks, canaries=canaries) for name, folder in folders.items()
    }
    passes = further_passes(
        run, {name: folders[name] for name in settings.models}, ranks, audit_folder(run) / "passes",
        key=lambda folder: _signals_key(run, manifest, folder),
        left_out=lambda split: set() if canaries is None else canaries.documents(split),
    )  # fmt: skip
    of_shadows = [
        document_losses(_signals_of(run, manifest, f"shadow {number}", folder, ranks, canaries=None).values())
        for number, folder in enumerate(shadows)
    ]
    figures: AuditFigures = ranks.first_does(
        lambda: _attack_all(run, passes.without_prefixes(signals), passes, of_shadows, canaries)
    )
    ranks.barrier()
    return figures


def print_figures(figures: AuditFigures) -> None:
    """Print the tables and warnings; where there is no terminal, as wide as they need to be."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    for table in (comparison_table, further_table, adaptive_table, collection_table, canary_table):
        if (lines := table(figures.models)).row_count:
            console.print(lines)
    for warning in figures.checks.warnings if figures.checks is not None else ():
        console.print(f"warning: {warning}", markup=False)


def audit_folder(run: RunConfig) -> Path:
    """Return where a run's audit is kept."""
    return Path(run.output_dir) / "audit"


def _attack_all(
    run: RunConfig, signals: dict[str, dict[str, Signals]], passes: FurtherPasses, of_shadows: list[DocumentLosses],
    canaries: CanarySource | None,
) -> AuditFigures:  # fmt: skip
    """Attack every model (on rank 0) and write the figures."""
    settings = run.audit
    fit = fit_losses(of_shadows, run.seed) if of_shadows else None
    contexts = {}
    for split in (settings.members, settings.non_members):
        table = BlockStream(prepared(run.data), split, seed=run.seed, verify=False).document_table()
        sizes = dict(zip(table["doc"].to_pylist(), table["zlib_bytes"].to_pylist(), strict=True))
        reference = signals[ATTACKER][split] if ATTACKER in signals else None
        contexts[split] = AttackContext(reference=reference, zlib_bytes=sizes, shadows=fit)
    audits = [
        audit_model(
            name,
            signals[name][settings.members],
            signals[name][settings.non_members],
            member_context=passes.known(name, settings.members, contexts[settings.members]),
            non_member_context=passes.known(name, settings.non_members, contexts[settings.non_members]),
            config=settings,
        )
        for name in settings.models
    ]
    if canaries is not None:
        texts, reference = canaries.texts(), signals.get(ATTACKER, {}).get(KIND)
        found = [audit_canaries(signals[model.name][KIND], texts, settings, reference) for model in audits]
        audits = [model.model_copy(update={"canaries": one}) for model, one in zip(audits, found, strict=True)]
    figures = AuditFigures(
        settings=settings, models=audits, checks=_check(run, audits, signals), prefix_documents=passes.prefixes
    )
    write_text(audit_folder(run) / AUDIT_FILE, figures.model_dump_json(indent=1))
    return figures


def _check(run: RunConfig, audits: list[ModelAudit], signals: dict[str, dict[str, Signals]]) -> Checks:
    """Look for differences between members and non-members that no model is needed to see."""
    settings = run.audit
    audited = next(iter(settings.models))
    streams = [BlockStream(prepared(run.data), split, seed=run.seed, verify=False)
               for split in (settings.members, settings.non_members)]  # fmt: skip
    texts = [token_ids(stream, signals[audited][stream.split].document, settings.batch_size) for stream in streams]
    table = streams[0].document_table()
    tokens_per_character = pc.sum(table["n_tokens"]).as_py() / pc.sum(table["n_characters"]).as_py()
    passage = max(1, round(PASSAGE_CHARACTERS * tokens_per_character))
    null = next((model for model in audits if model.name == settings.null_model), None)
    return check_audit(texts[0], texts[1], passage_tokens=passage, null_model=null, seed=settings.seed)


def _signals_of(
    run: RunConfig, manifest: Manifest, name: str, folder: Path, ranks: Ranks, *, canaries: CanarySource | None
) -> dict[str, Signals]:
    """Return a model's signals over members, non-members and canaries, if there are any; only rank 0 gets them, the
    others an empty dictionary."""
    settings = run.audit
    splits = (settings.members, settings.non_members)
    key = ranks.first_does(lambda: _signals_key(run, manifest, folder))
    attacker = name == ATTACKER
    kinds = {split: split for split in splits} | ({} if canaries is None else {KIND: canaries.key(attacker=attacker)})
    files = {kind: audit_folder(run) / "signals" / f"{key}-{ending}.npz" for kind, ending in kinds.items()}
    if not ranks.from_first(all(file.is_file() for file in files.values())):
        forward = build_forward_only(
            folder, precision=settings.precision, batch_size=settings.batch_size, deepspeed_json=settings.deepspeed,
            ranks=ranks, signals=token_signals, trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        for kind, file in files.items():
            title = f"audit {name}, {kind}"
            if canaries is not None and kind == KIND:
                builder = canary_pass(canaries, forward, title, ranks, attacker=attacker)
            else:
                builder = _model_pass(run, kind, forward, title, ranks, canaries=canaries)
            if builder is not None:
                builder.build().save(file)
        ranks.barrier()
    return {kind: Signals.load(file) for kind, file in files.items()} if ranks.is_first else {}


def _model_pass(
    run: RunConfig,
    split: str,
    forward: Callable[[Any], Any],
    title: str,
    ranks: Ranks,
    *,
    canaries: CanarySource | None,
) -> SignalsBuilder | None:  # fmt: skip
    """Run a model over the chosen documents of a split; returns all ranks' signals on rank 0, None elsewhere.

    Canaries are left out: they are of another kind than the other documents, and would be told from them by that.
    """
    settings = run.audit
    stream = ranks.together(
        lambda: BlockStream(
            prepared(run.data), split, seed=run.seed, verify_rank=ranks.rank, verify_world_size=ranks.world_size
        )
    )
    table = stream.document_table()
    left_out = set() if canaries is None else canaries.documents(split)
    lengths = {doc: length for doc, length in zip(table["doc"].to_pylist(), table["n_tokens"].to_pylist(), strict=True)
               if doc not in left_out}  # fmt: skip
    chosen = choose_documents(np.array(list(lengths)), settings.max_documents, settings.seed)
    builder = SignalsBuilder({int(document): lengths[int(document)] for document in chosen})
    documents = None if settings.max_documents is None else chosen
    calls = stream.sequential_batches(settings.batch_size, ranks.world_size, documents=documents)
    with RunProgress(title, calls, active=ranks.is_first, plain_every=max(1, calls // 4)) as progress:
        for batch, segments in stream.sequential(
            settings.batch_size, ranks.rank, ranks.world_size, documents=documents
        ):
            builder.add(forward(batch), batch["labels"], [_with_columns(row) for row in segments])
            progress.advance(1)
    parts = ranks.gather_objects_to_first(builder)
    if parts is None:
        return None
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0]


def _with_columns(row: list[Segment]) -> list[Piece]:
    """Add to each (document, start, length) of a block the column where it lies: pieces are laid end to end."""
    pieces, column = [], 0
    for document, start, length in row:
        pieces.append(Piece(document, start, length, column))
        column += length
    return pieces


def _signals_key(run: RunConfig, manifest: Manifest, folder: Path) -> str:
    """Name signals by all they depend on: weights, blocks, tokenizer, precision and choice of documents."""
    settings = run.audit
    parts = [weights_digest(folder), blocks_digest(manifest), manifest.tokenizer_fingerprint, settings.precision,
             str(settings.max_documents), str(settings.seed)]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
