"""An audit of texts that were not prepared: read, tokenized by the audited models' own tokenizers, and packed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualtok.config.data import DataConfig
from dualtok.data.sources.documents import read_documents
from dualtok.data.sources.rows import WHICH
from dualtok.data.text_lists import TextList, pack_texts
from dualtok.data.tokenizer import fingerprint, load_tokenizer
from dualtok.errors import ConfigError, DataError
from dualtok.model.load import read_model_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from dualtok.audit.settings import AuditConfig, TextSource
    from dualtok.data.folder import DataFolder

MEMBERS, NON_MEMBERS = "members", "non_members"
"""Splits of the folder that texts are packed into."""
LONGEST_BLOCK = 4096
"""Tokens of a block where neither the models nor the settings ask for fewer."""


@dataclass(frozen=True)
class Job:
    """Models that read the same blocks."""

    settings: AuditConfig
    """With these models alone, and splits as members and non-members."""
    data: DataFolder
    folders: dict[str, Path]
    """Name of each model and of the attacker's reference -> its folder."""


def read_texts(source: TextSource, key: str, group_field: str | None = None) -> TextList:
    """Read a list of texts.

    Args:
        source: where they are.
        key: names the list in errors, e.g. ``audit.members``.
        group_field: key or column that says whose each text is.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    config = DataConfig(
        dir="",
        source=source.source,
        field=source.field,
        txt_documents=source.txt_documents,
        dataset_config=source.dataset_config,
        dataset_split=source.dataset_split,
        group_field=group_field,
        tokenizer="of the model",
        shares={"train": 1.0},
    )
    try:
        documents = list(read_documents(config))
    except DataError as error:
        reason = str(error).replace("data.source", f"{key}.source").replace("data.group_field", "audit.group_field")
        reason = reason.replace(WHICH, "give a file that has one of them")
        raise DataError(f"{key}: {reason}") from None
    if not documents:
        raise DataError(f"{key}: {source.source}: no documents")
    groups = None if group_field is None else [document.group for document in documents]
    origins = [document.origin if document.is_chat else None for document in documents]
    return TextList([document.text for document in documents], groups, origins if any(origins) else None)


def text_jobs(
    settings: AuditConfig,
    lists: Mapping[str, TextList],
    folders: Mapping[str, Path],
    references: Iterable[str],
    kept: Path,
) -> list[Job]:
    """Pack the texts for each tokenizer that the models have, and say which models read what.

    Args:
        settings: of the audit.
        lists: :data:`MEMBERS` and :data:`NON_MEMBERS` -> the texts.
        folders: name of each model and of the attacker's references -> its folder.
        references: the names that are the attacker's.
        kept: where packed texts are kept.

    Raises:
        ConfigError: a model has no tokenizer, or no model has the tokenizer of an attacker's reference.
        DataError: a list has no text.
    """
    tokenizers = {name: _tokenizer(name, folder) for name, folder in folders.items()}
    kinds = {name: fingerprint(tokenizer) for name, tokenizer in tokenizers.items()}
    attackers = set(references)
    jobs = []
    for kind in dict.fromkeys(kinds[name] for name in settings.models):
        mine = [name for name in settings.models if kinds[name] == kind]
        theirs = [name for name in attackers if kinds[name] == kind]
        here = {name: folders[name] for name in (*mine, *sorted(theirs))}
        data = pack_texts(kept, lists, tokenizers[mine[0]], most_tokens=most_tokens(settings, here))
        jobs.append(Job(_settings_of(settings, mine), data, here))
    lost = [name for name in attackers if kinds[name] not in {kinds[name] for name in settings.models}]
    if lost:
        raise ConfigError(
            f"audit: {lost[0]} ({folders[lost[0]]}) has another tokenizer than every audited model, so that their "
            "losses cannot be compared token by token; give a reference with the model's own tokenizer"
        )
    return jobs


def _settings_of(settings: AuditConfig, models: list[str]) -> AuditConfig:
    return dataclasses.replace(
        settings,
        models={name: settings.models[name] for name in models},
        adapters={name: adapter for name, adapter in settings.adapters.items() if name in models},
        null_model=settings.null_model if settings.null_model in models else None,
        members=MEMBERS,
        non_members=NON_MEMBERS,
        attack_reference=settings.references or None,
        base=None,
        block_length=None,
    )


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(folder)
    except DataError as error:
        reason = str(error).removesuffix(" (data.tokenizer)")
        raise ConfigError(f"audit: {name}: {reason}; texts are tokenized by the model's own tokenizer") from None


def most_tokens(settings: AuditConfig, folders: Mapping[str, Path]) -> int:
    """Return the longest piece of a text that some models (name -> folder) read at once, in tokens."""
    limits = [settings.block_length or LONGEST_BLOCK]
    for folder in folders.values():
        config = read_model_config(
            folder, trust_remote_code=settings.trust_remote_code, setting="audit.trust_remote_code"
        ).get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 1:
            limits.append(positions)
    return min(limits)
