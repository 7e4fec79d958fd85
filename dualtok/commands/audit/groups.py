"""Whose each document of prepared data is, and what the report calls these persons."""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.statistics.evaluate import choose_documents
from dualtok.audit.statistics.groups import DocumentGroups, require_groups
from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from dualtok.audit.settings import AuditConfig
    from dualtok.data.folder import DataFolder

COLUMN = "group"
"""Column of a split's table of documents."""
KEY_FILE = "group_key"
HASH_BYTES = 3


def document_groups(settings: AuditConfig, data: DataFolder, folder: Path) -> DocumentGroups | None:
    """Return whose the members and non-members are; None without ``audit.group_field``.

    Args:
        settings: the audit's.
        data: prepared data.
        folder: the audit's own, which keeps the key of hidden names.

    Raises:
        ConfigError: the data was prepared without groups, or with those of another field.
    """
    if settings.group_field is None:
        return None
    members, non_members = (_groups_of(settings, data, split) for split in settings.splits)
    return DocumentGroups(members, non_members, str if settings.show_group_names else hidden_names(folder / KEY_FILE))


def check_groups(settings: AuditConfig, data: DataFolder, left_out: Callable[[str], Collection[int]]) -> None:
    """Refuse groups that cannot be audited, before any model is run.

    Args:
        settings: the audit's.
        data: prepared data.
        left_out: split -> documents that are not audited.

    Raises:
        ConfigError: as :func:`document_groups`.
        DataError: as :func:`.statistics.groups.require_groups`.
    """
    if settings.group_field is None:
        return
    sides = []
    for split in settings.splits:
        known, missing = _groups_of(settings, data, split), left_out(split)
        documents = [doc for doc in data.documents(split)["doc"].to_pylist() if doc not in missing]
        chosen = choose_documents(np.array(documents), settings.max_documents, settings.seed)
        sides.append([known.get(int(document)) for document in chosen])
    require_groups(*sides, field=settings.group_field, min_documents=settings.min_group_documents)


def _groups_of(settings: AuditConfig, data: DataFolder, split: str) -> dict[int, str]:
    table = data.documents(split)
    prepared = data.manifest.config.get("group_field")
    if COLUMN not in table.column_names:
        raise ConfigError(
            f"audit.group_field: {settings.group_field!r}, but {data} was prepared without data.group_field; prepare "
            f"the source again with data.group_field: {settings.group_field}, in another data.dir, and train on that"
        )
    if prepared not in (None, settings.group_field):
        raise ConfigError(
            f"audit.group_field: {settings.group_field!r}, but {data} was prepared with data.group_field: {prepared}; "
            "use the same"
        )
    pairs = zip(table["doc"].to_pylist(), table[COLUMN].to_pylist(), strict=True)
    return {document: group for document, group in pairs if group is not None}


def hidden_names(key_file: Path) -> Callable[[str], str]:
    """Return a function from a group to a short name that only who has the key can link to it.

    Without a key, names could be found by hashing all names that come into question. The key is drawn at random once
    and stays beside the audit, so that a group has the same name for every model and when the audit is run again.
    """
    if not key_file.is_file():
        key_file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    key = bytes.fromhex(key_file.read_text(encoding="utf-8"))
    return lambda group: f"group {hashlib.blake2b(group.encode(), key=key, digest_size=HASH_BYTES).hexdigest()}"
