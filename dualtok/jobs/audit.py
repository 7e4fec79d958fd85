"""``dualtok audit``: run every model once over members and non-members, attack what it gives away, keep the figures.

The model pass is shared by all ranks and its signals are kept, so that an interrupted audit continues with the next
model and attacks can be run again without a model.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from rich.console import Console

from dualtok.audit.attacks import AttackContext
from dualtok.audit.checks import PASSAGE_CHARACTERS, check_audit
from dualtok.audit.evaluate import audit_model, choose_documents
from dualtok.audit.from_logits import token_signals
from dualtok.audit.report_data import AuditFigures
from dualtok.audit.signal_files import write_ragged
from dualtok.audit.signals import TOKEN_DTYPES, Signals, SignalsBuilder
from dualtok.audit.table import adaptive_table, collection_table, comparison_table, token_table
from dualtok.data.manifest import load_manifest
from dualtok.data.remote import prepared
from dualtok.data.stream import BlockStream
from dualtok.data.tokenizer import load_data_tokenizer
from dualtok.engine.distributed import Ranks, join_ranks
from dualtok.engine.zero import build_forward_only
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.jobs.audit_joint import KL_DTYPES, joint_forward, read_divergences
from dualtok.jobs.audit_texts import attacker_frequencies, document_pieces, predicted_ids, with_columns
from dualtok.model.load import check_fits, read_model_config
from dualtok.model.weights import model_folder
from dualtok.monitor.progress import RunProgress
from dualtok.reference.fingerprint import blocks_digest, weights_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from dualtok.audit.report_data import Checks, ModelAudit
    from dualtok.data.manifest import Manifest
    from dualtok.jobs.audit_texts import Pieces
    from dualtok.run import RunConfig

    Divergences = dict[int, NDArray[np.float32]]

ATTACKER = "attack_reference"
AUDIT_FILE = "audit.json"
TABLE_WIDTH = 120


def audit(run: RunConfig) -> AuditFigures:
    """Audit every model of ``audit.models`` and write ``<output_dir>/audit/audit.json``.

    On ranks other than the first the figures are the same.

    Raises:
        ConfigError: no models are named, or one does not fit the blocks.
        DataError: a shard is missing or altered, or a class has no documents.
    """
    settings = run.audit
    if not settings.models:
        raise ConfigError("audit.models: name at least one model folder to audit, e.g. {dual: models/dual}")
    place = prepared(run.data)
    manifest = load_manifest(place)
    ranks = join_ranks()
    folders = {name: model_folder(path) for name, path in settings.models.items()}
    if settings.attack_reference is not None:
        folders[ATTACKER] = model_folder(settings.attack_reference)
    vocabulary = len(load_data_tokenizer(place, manifest))
    logits: dict[str, int] = {}
    for name, folder in folders.items():
        config = read_model_config(
            folder, trust_remote_code=settings.trust_remote_code, setting="audit.trust_remote_code"
        )
        check_fits(config, vocabulary=vocabulary, block_length=manifest.block_length, origin=f"audit: {name}")
        logits[name] = config.get_text_config().vocab_size
    compares = "info_rmia" in settings.attacks and ATTACKER in folders
    differ = [name for name in folders if compares and logits[name] != logits[ATTACKER]]
    if differ:
        raise ConfigError(
            f"audit.models: {differ[0]!r} has {logits[differ[0]]} logits and the attacker's reference "
            f"{logits[ATTACKER]}, so that their distributions cannot be compared; leave info_rmia out of audit.attacks"
        )
    keys = {name: ranks.first_does(partial(_signals_key, run, manifest, folder)) for name, folder in folders.items()}
    signals = {name: _signals_of(run, name, folder, keys[name], ranks) for name, folder in folders.items()}
    divergences = {name: _divergences_of(run, name, folders, keys, ranks) for name in settings.models if compares}
    figures: AuditFigures = ranks.first_does(lambda: _attack_all(run, signals, divergences))
    ranks.barrier()
    return figures


def print_figures(figures: AuditFigures) -> None:
    """Print the tables and warnings; where there is no terminal, as wide as they need to be."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    for table in (comparison_table, token_table, adaptive_table, collection_table):
        console.print(table(figures.models))
    for warning in figures.checks.warnings if figures.checks is not None else ():
        console.print(f"warning: {warning}", markup=False)


def audit_folder(run: RunConfig) -> Path:
    """Return where a run's audit is kept."""
    return Path(run.output_dir) / "audit"


def _attack_all(
    run: RunConfig, signals: dict[str, dict[str, Signals]], divergences: dict[str, dict[str, Divergences]]
) -> AuditFigures:
    """Attack every model (on rank 0) and write the figures."""
    settings = run.audit
    contexts: dict[str, AttackContext] = {}
    texts: dict[str, dict[int, Pieces]] = {}
    frequencies = attacker_frequencies(run) if "dc_pdd" in settings.attacks else None
    audited = next(iter(settings.models))
    for split in (settings.members, settings.non_members):
        stream = BlockStream(prepared(run.data), split, seed=run.seed, verify=False)
        texts[split] = document_pieces(stream, signals[audited][split].document, settings.batch_size)
        table = stream.document_table()
        sizes = dict(zip(table["doc"].to_pylist(), table["zlib_bytes"].to_pylist(), strict=True))
        contexts[split] = AttackContext(
            reference=signals[ATTACKER][split] if ATTACKER in signals else None,
            zlib_bytes=sizes,
            token_ids=predicted_ids(texts[split]),
            frequencies=frequencies,
        )
    audits = [
        audit_model(
            name,
            signals[name][settings.members],
            signals[name][settings.non_members],
            member_context=replace(contexts[settings.members], kl_from_reference=kl.get(settings.members)),
            non_member_context=replace(contexts[settings.non_members], kl_from_reference=kl.get(settings.non_members)),
            config=settings,
        )
        for name in settings.models
        for kl in (divergences.get(name, {}),)
    ]
    figures = AuditFigures(settings=settings, models=audits, checks=_check(run, audits, texts))
    write_text(audit_folder(run) / AUDIT_FILE, figures.model_dump_json(indent=1))
    return figures


def _check(run: RunConfig, audits: list[ModelAudit], texts: dict[str, dict[int, Pieces]]) -> Checks:
    """Look for differences between members and non-members that no model is needed to see."""
    settings = run.audit
    members, non_members = ([np.concatenate(pieces) for pieces in texts[split].values()]
                            for split in (settings.members, settings.non_members))  # fmt: skip
    table = BlockStream(prepared(run.data), settings.members, seed=run.seed, verify=False).document_table()
    tokens_per_character = pc.sum(table["n_tokens"]).as_py() / pc.sum(table["n_characters"]).as_py()
    passage = max(1, round(PASSAGE_CHARACTERS * tokens_per_character))
    null = next((model for model in audits if model.name == settings.null_model), None)
    return check_audit(members, non_members, passage_tokens=passage, null_model=null, seed=settings.seed)


def _signals_of(run: RunConfig, name: str, folder: Path, key: str, ranks: Ranks) -> dict[str, Signals]:
    """Return a model's signals over members and non-members; only rank 0 gets them, the others an empty dictionary."""
    settings = run.audit
    files = _files(run, key)
    if not ranks.from_first(all(file.is_file() for file in files.values())):
        forward = build_forward_only(
            folder, precision=settings.precision, batch_size=settings.batch_size, deepspeed_json=settings.deepspeed,
            ranks=ranks, signals=token_signals, trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        for split, file in files.items():
            builder = _model_pass(run, split, forward, f"audit {name}, {split}", ranks)
            if builder is not None:
                builder.build().save(file)
        ranks.barrier()
    return {split: Signals.load(file) for split, file in files.items()} if ranks.is_first else {}


def _divergences_of(
    run: RunConfig, name: str, folders: dict[str, Path], keys: dict[str, str], ranks: Ranks
) -> dict[str, Divergences]:
    """Return KL(p_reference || p) of a model's members and non-members, on rank 0 alone as :func:`_signals_of`."""
    files = _files(run, f"{keys[name]}-{keys[ATTACKER]}")
    if not ranks.from_first(all(file.is_file() for file in files.values())):
        forward = joint_forward(folders[name], folders[ATTACKER], run.audit, ranks)
        for split, file in files.items():
            builder = _model_pass(run, split, forward, f"compare {name}, {split}", ranks, dtypes=KL_DTYPES)
            if builder is not None:
                write_ragged(file, builder.build_ragged())
        ranks.barrier()
    return {split: read_divergences(file) for split, file in files.items()} if ranks.is_first else {}


def _files(run: RunConfig, key: str) -> dict[str, Path]:
    """Return the file of each class' split for what a key names."""
    splits = (run.audit.members, run.audit.non_members)
    return {split: audit_folder(run) / "signals" / f"{key}-{split}.parquet" for split in splits}


def _model_pass(
    run: RunConfig,
    split: str,
    forward: Callable[[Any], Any],
    title: str,
    ranks: Ranks,
    *,
    dtypes: Mapping[str, type[np.generic]] = TOKEN_DTYPES,
) -> SignalsBuilder | None:
    """Run a model over the chosen documents of a split; returns all ranks' signals on rank 0, None elsewhere."""
    settings = run.audit
    stream = ranks.together(
        lambda: BlockStream(
            prepared(run.data), split, seed=run.seed, verify_rank=ranks.rank, verify_world_size=ranks.world_size
        )
    )
    table = stream.document_table()
    lengths = dict(zip(table["doc"].to_pylist(), table["n_tokens"].to_pylist(), strict=True))
    chosen = choose_documents(np.array(list(lengths)), settings.max_documents, settings.seed)
    builder = SignalsBuilder({int(document): lengths[int(document)] for document in chosen}, dtypes)
    documents = None if settings.max_documents is None else chosen
    calls = stream.sequential_batches(settings.batch_size, ranks.world_size, documents=documents)
    with RunProgress(title, calls, active=ranks.is_first, plain_every=max(1, calls // 4)) as progress:
        for batch, segments in stream.sequential(
            settings.batch_size, ranks.rank, ranks.world_size, documents=documents
        ):
            builder.add(forward(batch), batch["labels"], [with_columns(row) for row in segments])
            progress.advance(1)
    parts = ranks.gather_objects_to_first(builder)
    if parts is None:
        return None
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0]


def _signals_key(run: RunConfig, manifest: Manifest, folder: Path) -> str:
    """Name signals by all they depend on: weights, blocks, tokenizer, precision and choice of documents."""
    settings = run.audit
    parts = [weights_digest(folder), blocks_digest(manifest), manifest.tokenizer_fingerprint, settings.precision,
             str(settings.max_documents), str(settings.seed)]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
