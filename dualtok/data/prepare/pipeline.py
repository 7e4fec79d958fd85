"""``dualtok prepare``: documents to deduplicated, split, tokenized, packed and checksummed shards.

Stages, each of which continues where an interruption left it: the documents are read, hashed and staged
(:mod:`.ingest`), by this process or by several parts; those with a common key are found (:mod:`.groups`) and each
document decided on (:mod:`.decide`); the tokenizer; one packed file per chunk of documents, and the shards
(:mod:`.assemble`). A finished file is never written again. Memory holds one chunk of documents per process, whatever
the size of the corpus. The manifest is written last.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from dualtok.config.data import SCHEDULING, SPLITS, DataConfig, is_address
from dualtok.config.old_names import with_new_names
from dualtok.data.chat.templates import ChatTemplateError, with_template
from dualtok.data.manifest import (
    CHAT_FORMAT_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    ChatEntry,
    Facts,
    Manifest,
    load_manifest,
    save_manifest,
)
from dualtok.data.prepare.assemble import (
    DOCUMENT,
    HowToPack,
    TokenizerAt,
    count_tokens,
    longer_than_a_block,
    pack_chunks,
    spelled_out,
    split_texts,
    write_splits,
)
from dualtok.data.prepare.canaries import SAMPLED, assign_to_chunks, made_canaries, sampled_texts, write_canaries
from dualtok.data.prepare.decide import Decisions, UnusableCorpusError, decide
from dualtok.data.prepare.groups import find_groups, steps
from dualtok.data.prepare.ingest import stage_part, staged_files
from dualtok.data.prepare.parallel import Workers
from dualtok.data.prepare.parts import (
    ALONE,
    COMPLETE,
    Part,
    PartReader,
    begin_part,
    check_parts,
    claimed,
    parts_in,
    require_same_part,
)
from dualtok.data.prepare.shared_passages import shared_with_members
from dualtok.data.prepare.staged import Staged
from dualtok.data.prepare.summary import summary
from dualtok.data.sources.documents import left_out
from dualtok.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_size
from dualtok.data.tokenizer_check import lost, sample
from dualtok.errors import ConfigError, DataError
from dualtok.files import file_sha256, write_text
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

    from dualtok.data.prepare.canaries import TextSampler

__all__ = ["DOCUMENT", "finish", "prepare", "prepare_part", "summary"]
STAGING = ".staging"
DEFAULT_VOCABULARY = 4096
TOKENIZER_CHARACTERS = 1 << 28
"""At most about so much text trains a tokenizer; its trainer keeps every distinct word in memory."""
CONFIG_ECHO = "prepare.json"


def prepare(config: DataConfig, *, progress: bool = True, sampler: TextSampler | None = None) -> Manifest:
    """Prepare ``config.source`` into ``config.dir``, or return at once if that was done with the same settings.

    Args:
        config: the ``data`` section of a run.
        progress: whether to show progress and a summary.
        sampler: what samples the texts of ``data.canaries.kind: high_temperature``; the other kinds need nothing.

    Raises:
        DataError: the source or the tokenizer cannot be read, the corpus is empty, or a split is; another process
            prepares the same folder, or parts are being prepared there.
        ConfigError: ``config.dir`` was prepared with other settings.
    """
    folder, staging = Path(config.dir), Path(config.dir) / STAGING
    settings = _result_settings(config)
    if (manifest := _prepared(folder, settings, progress=progress)) is not None:
        return manifest
    _refuse_other_parts(staging)
    kept_if_staged = _removed_if_hopeless(folder, ALONE.folder(staging))
    with _work_on(folder, settings), kept_if_staged, Workers(config.processes) as workers:
        _convert_tokenizer(config)
        _sample_canaries(config, sampler)
        _stage(config, ALONE, settings, workers, progress=progress)
        return _finish(config, settings, ALONE.of, workers, progress=progress)


def prepare_part(config: DataConfig, part: Part, *, progress: bool = True) -> None:
    """Read, hash and stage one of several parts of the source, beside others on any host; ``finish`` does the rest.

    Args:
        config: the ``data`` section of a run; ``config.dir`` must be shared by all hosts.
        part: which of how many.
        progress: whether to show progress.

    Raises:
        DataError: the source cannot be read; this part is running elsewhere, or the folder holds parts of another
            number.
        ConfigError: the folder, or another part, was begun with other settings.
    """
    folder, staging = Path(config.dir), Path(config.dir) / STAGING
    settings = _result_settings(config)
    if _prepared(folder, settings, progress=progress, sweep=False) is not None:
        return
    mine = part.folder(staging)
    was_there = mine.is_dir()
    try:
        with Workers(config.processes) as workers:
            _stage(config, part, settings, workers, progress=progress)
    except BaseException:
        if not was_there and not staged_files(mine):
            _remove_part(mine)
        raise
    _print(f"part {part} is complete in {mine}; when all are, run `dualtok prepare --finish`", active=progress)


def finish(config: DataConfig, *, progress: bool = True, sampler: TextSampler | None = None) -> Manifest:
    """Deduplicate, split, tokenize and pack what all parts staged: the same bytes as one process gives.

    Args:
        config: the ``data`` section of a run.
        progress: whether to show progress and a summary.
        sampler: what samples the texts of ``data.canaries.kind: high_temperature``; the other kinds need nothing.

    Raises:
        DataError: parts are missing, incomplete or still running, or as :func:`prepare`.
        ConfigError: a part or the folder was made with other settings.
    """
    folder, staging = Path(config.dir), Path(config.dir) / STAGING
    settings = _result_settings(config)
    if (manifest := _prepared(folder, settings, progress=progress)) is not None:
        return manifest
    of = check_parts(staging, settings)
    parts_stay = _removed_if_hopeless(folder, staging, keep_parts=True)
    with _work_on(folder, settings), parts_stay, Workers(config.processes) as workers:
        _convert_tokenizer(config)
        _sample_canaries(config, sampler)
        return _finish(config, settings, of, workers, progress=progress)


def _stage(config: DataConfig, part: Part, settings: dict[str, Any], workers: Workers, *, progress: bool) -> None:
    staging = Path(config.dir) / STAGING
    folder = part.folder(staging)
    with claimed(folder, f"part {part}"):
        if (folder / COMPLETE).is_file():
            require_same_part(part, settings, staging)
            return
        _sweep(folder)
        reader = PartReader(config, part)
        begin_part(config, part, staging, settings, reader.listing())
        name = "documents" if part == ALONE else f"documents of part {part}"
        with RunProgress(f"prepare: {name} read", None, active=progress) as bar:
            stage_part(config, reader, folder, workers, progress=bar)


def _finish(config: DataConfig, settings: dict[str, Any], of: int, workers: Workers, *, progress: bool) -> Manifest:
    """Make shards and manifest of what is staged."""
    folder, staging = Path(config.dir), Path(config.dir) / STAGING
    staged = Staged(staging, of)
    with RunProgress("prepare: keys sorted", steps(config, staged.documents), active=progress) as bar:
        groups = find_groups(config, staged, workers, bar)
    with RunProgress("prepare: chunks deduplicated", None, active=progress) as bar:
        decisions = decide(config, staged, groups, bar)
    decisions.check(config)
    tokenizer = _keep_tokenizer(folder / "tokenizer", lambda: _trained_tokenizer(config, staged, decisions))
    tokenizer_at = TokenizerAt(str(folder / "tokenizer"), fingerprint(tokenizer))
    train_on = config.train_on or "assistant"
    masked = decisions.conversations_kept > 0 and train_on != "all"
    how = HowToPack.of(config, staged, tokenizer_at, masked=masked)
    count = partial(count_tokens, how, decisions.chunks, workers, progress=progress)
    canaries, seen = made_canaries(config, staged, decisions.read, tokenizer, count)
    canaries_of_chunk = {} if config.canaries is None else assign_to_chunks(canaries, config.canaries, decisions.chunks)
    with RunProgress("prepare: chunks packed", len(decisions.chunks), active=progress) as bar:
        pack_chunks(how, decisions.chunks, workers, canaries=canaries_of_chunk, progress=bar)
    splits = write_splits(config, folder, staging, decisions.chunks, workers, masked=masked, progress=progress)
    texts = sample(split_texts(staged, decisions.chunks, "train", chats=how.chats))
    unread = left_out(config)
    facts = Facts(
        compared_by_characters=decisions.compared_by_characters,
        with_special_tokens=spelled_out(staging, decisions.chunks),
        sampled=len(texts),
        lost=dict(lost(tokenizer, texts)),
        left_out_files=len(unread),
        shared_passages=shared_with_members(folder, splits),
    )
    chat = None
    if decisions.conversations_kept:
        longer = longer_than_a_block(staging, decisions.chunks)
        chat = ChatEntry(train_on=train_on, conversations=decisions.conversations_kept, longer=longer)
    manifest = Manifest(
        format_version=CHAT_FORMAT_VERSION if masked else FORMAT_VERSION,
        config=settings,
        seed=config.seed,
        tokenizer_fingerprint=tokenizer_at.fingerprint,
        vocabulary=vocabulary_size(tokenizer),
        block_length=config.block_length,
        lanes=config.lanes,
        documents_read=decisions.read,
        exact_duplicates=decisions.count("exact"),
        near_duplicates=decisions.count("near"),
        too_short=decisions.count("too_short"),
        unused=decisions.count("unused"),
        splits=splits,
        canaries=write_canaries(canaries, folder, seen) if canaries else None,
        facts=facts,
        chat=chat,
    )
    _sweep(folder)  # a worker of a killed start may have outlived it for a moment
    save_manifest(manifest, folder)
    shutil.rmtree(staging)
    _print(summary(manifest, unread), active=progress)
    return manifest


def _prepared(folder: Path, settings: dict[str, Any], *, progress: bool, sweep: bool = True) -> Manifest | None:
    """Return the manifest of a folder that is already prepared with these settings.

    Raises:
        DataError: it is a file.
        ConfigError: it was prepared, or begun, with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file, not a folder to write prepared data into (data.dir)")
    _require_same_settings(folder, settings)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load_manifest(folder)
    if sweep:
        shutil.rmtree(folder / STAGING, ignore_errors=True)  # left if an earlier run was killed in its last moment
    _print(f"{folder}: already prepared", active=progress)
    return manifest


def _refuse_other_parts(staging: Path) -> None:
    others = {part.of for part in parts_in(staging)} - {ALONE.of}
    if others:
        raise DataError(
            f"{staging}: holds parts of {max(others)}; complete them and run `dualtok prepare --finish`, or remove "
            "the folder"
        )


@contextmanager
def _work_on(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Claim the folder, clear it of half-written files and note the settings."""
    with claimed(folder / STAGING, "`dualtok prepare`"):
        _sweep(folder)
        write_text(folder / CONFIG_ECHO, json.dumps(settings, indent=1, sort_keys=True))
        yield


@contextmanager
def _removed_if_hopeless(folder: Path, staged: Path, *, keep_parts: bool = False) -> Iterator[None]:
    """After an error remove what another start could not continue, so that nothing half-written stays.

    Args:
        folder: ``data.dir``.
        staged: a part's folder; or the staging folder, where with ``keep_parts`` the parts themselves don't count.
        keep_parts: whether to leave the parts.
    """
    try:
        yield
    except BaseException as error:
        made = [*staged.glob("documents-*"), *staged.glob(COMPLETE), *staged.glob("keys-*")]
        if isinstance(error, UnusableCorpusError | ChatTemplateError) or not made:
            _forget(folder, keep_parts=keep_parts)
        raise


def _result_settings(config: DataConfig) -> dict[str, Any]:
    if is_address(config.dir):
        raise ConfigError(f"data.dir: {config.dir}: data is prepared in a local folder; upload that in the end")
    values: dict[str, Any] = TypeAdapter(DataConfig).dump_python(config, mode="json")
    if config.chat_template is not None and Path(config.chat_template).is_file():
        values["chat_template"] = f"sha256:{file_sha256(config.chat_template)}"  # another text is another setting
    if values["canaries"] is not None:
        # Settings of another kind are left out, as in folders that are older than these settings.
        values["canaries"] = {key: value for key, value in values["canaries"].items() if value is not None}
    return {key: value for key, value in values.items() if key not in (*SCHEDULING, "dir")}


def _require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix two preparations in one folder."""
    path = folder / CONFIG_ECHO
    if not path.is_file():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    earlier = with_new_names({"data": stored})[0]["data"]
    # A setting that is younger than the folder is not held against it, but neither groups nor conversations can be had
    # from one without them.
    for key in sorted({*earlier, "group_field", "chat_template", "train_on"}):
        if earlier.get(key) != settings.get(key):
            raise ConfigError(
                f"data.{key}: {settings.get(key)!r}, but {folder} was prepared with {earlier.get(key)!r}; choose "
                "another data.dir or remove the folder"
            )


def _sweep(folder: Path) -> None:
    """Remove the half-written files of a preparation that was killed."""
    for some in (folder, folder / STAGING, *(folder / split for split in SPLITS)):
        for path in some.glob(".*.tmp"):
            if path.is_file():
                path.unlink(missing_ok=True)


def _forget(folder: Path, *, keep_parts: bool = False) -> None:
    """Remove what a preparation left, but not what else is in the folder."""
    if keep_parts:
        for path in (folder / STAGING).iterdir():
            if path.is_file():
                path.unlink()
    else:
        shutil.rmtree(folder / STAGING, ignore_errors=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    (folder / CONFIG_ECHO).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_part(folder: Path) -> None:
    """Remove an empty part, and the folders around it unless something else is in them."""
    shutil.rmtree(folder, ignore_errors=True)
    for around in (folder.parent, folder.parent.parent):
        try:
            around.rmdir()
        except OSError:  # another part's, or the user's own
            return


def _convert_tokenizer(config: DataConfig) -> None:
    """Load the tokenizer that was named, if any, before the corpus is read: it may be unusable."""
    if config.tokenizer is not None:
        make = partial(load_tokenizer, config.tokenizer)
        _keep_tokenizer(Path(config.dir) / "tokenizer", lambda: with_template(make(), config.chat_template))


def _sample_canaries(config: DataConfig, sampler: TextSampler | None) -> None:
    """Sample the canaries that a model makes, if any, before the corpus is read: the model may be unusable."""
    if config.canaries is not None and config.canaries.kind == "high_temperature":
        sampled_texts(config.canaries, sampler, Path(config.dir) / STAGING / SAMPLED)


def _trained_tokenizer(config: DataConfig, staged: Staged, decisions: Decisions) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the split ``reference``, or on every k-th chunk of it if it is large."""
    every = max(1, -(-decisions.reference_characters // TOKENIZER_CHARACTERS))
    texts = split_texts(staged, decisions.chunks[::every], "reference", chats=config.rows != "text")
    return with_template(train_tokenizer(texts, config.vocab_size or DEFAULT_VOCABULARY), config.chat_template)


def _keep_tokenizer(folder: Path, make: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Load, convert or train the tokenizer once, and keep it beside the shards."""
    if not folder.is_dir():
        save_tokenizer(make(), folder)
    return load_tokenizer(folder)


def _print(text: str, *, active: bool) -> None:
    if active:
        print(text, flush=True)
