"""Which split a document belongs to: a function of the seed and its own text alone, or of its group's name.

It depends neither on the order of the corpus nor on what else is in it, so that adding documents never moves one from
the held-out split into training.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from dualtok.config.data import SPLITS

if TYPE_CHECKING:
    from collections.abc import Mapping


def content_digest(text: str) -> bytes:
    """Return the SHA-256 of a document's text."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def dealt_by(digest: bytes, group: str | None) -> bytes:
    """Return the digest that decides a document's split: of its text, or of its group, which stays together."""
    return digest if group is None else content_digest(group)


def uniform(seed: int, digest: bytes) -> float:
    """Return a number in [0, 1) that is uniform over documents, from a hash keyed by the seed."""
    keyed = hashlib.blake2b(digest, key=str(seed).encode(), digest_size=8, person=b"dualtok-split").digest()
    return int.from_bytes(keyed, "big") / 2**64


def assign_split(digest: bytes, shares: Mapping[str, float], seed: int) -> str | None:
    """Return a document's split, or None for the part of the corpus that no share covers."""
    position, end = uniform(seed, digest), 0.0
    for name in SPLITS:
        end += shares.get(name, 0.0)
        if position < end and name in shares:
            return name
    return None
