"""Canaries: made-up documents, each put into the split ``train`` or kept out by the toss of a fair coin of its own.

A run on the folder then has members and non-members whose membership is random and known, which is what a
lower bound on epsilon needs (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846), and secrets out of a space that is
known, which is what exposure needs (Carlini et al. 2019, arXiv 1802.08232).

All of it - texts, coins, places - is a keyed hash of ``data.canaries``, so any process on any host draws the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dualtok.config.canaries import SYMBOLS, CanaryConfig
from dualtok.data.manifest import CanariesEntry
from dualtok.data.prepare.decide import UnusableCorpusError
from dualtok.data.prepare.deduplicate import EXACT_BYTES, exact_digest
from dualtok.data.prepare.staged import Chunk, Staged, fixed_width
from dualtok.data.remote.remote import Location, RemoteFile, RemoteFolder, location_of
from dualtok.data.tokenizer import encode
from dualtok.errors import DataError
from dualtok.files import file_sha256, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from dualtok.data.manifest import Manifest

CANARIES = "canaries.jsonl"
SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou"]
NAME_SYLLABLES = 4
STAGED_AT_ONCE = 1 << 16


class Canary(BaseModel):
    """One line of ``canaries.jsonl``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    """Number of the canary, from 0."""
    prefix: str
    """What comes before the secret."""
    secret: str
    """The symbols that were drawn, separated by spaces."""
    text: str
    """The whole document: prefix, a space, secret."""
    included: bool
    """How its coin fell: whether it is a document of the split ``train``."""
    doc: int | None
    """Its number as a document, or None if it was kept out."""


def draw_canaries(config: CanaryConfig, first_document: int) -> list[Canary]:
    """Draw texts and coins.

    Args:
        config: how many, and of which kind.
        first_document: number of the first canary that is included; the source has lower ones.

    Returns:
        The canaries, by number. All texts differ.
    """
    canaries: list[Canary] = []
    texts: set[str] = set()
    document = first_document
    for number in range(config.count):
        attempt = 0
        while (drawn := _text(config, number, attempt))[2] in texts:
            attempt += 1
        texts.add(drawn[2])
        included = bool(_number(config, "coin", number) % 2)
        canaries.append(
            Canary(
                id=number,
                prefix=drawn[0],
                secret=drawn[1],
                text=drawn[2],
                included=included,
                doc=document if included else None,
            )
        )
        document += included
    return canaries


def secret_of(index: int, config: CanaryConfig) -> str:
    """Return the secret of this number, from 0 to ``config.space - 1``: its digits in the base of the alphabet."""
    symbols = SYMBOLS[config.kind]
    drawn = []
    for _ in range(config.length):
        index, position = divmod(index, len(symbols))
        drawn.append(symbols[position])
    return " ".join(reversed(drawn))


def candidates(canary: Canary, config: CanaryConfig, count: int) -> list[str]:
    """Return secrets that a canary might have had instead, without its own.

    Args:
        canary: the canary.
        config: the settings it was drawn with.
        count: how many; from so many on as there are, all others in their order, else that many drawn at random with
            replacement, the same each time.
    """
    if config.space - 1 <= count:
        return [other for index in range(config.space) if (other := secret_of(index, config)) != canary.secret]
    found: list[str] = []
    attempt = 0
    while len(found) < count:
        secret = secret_of(_number(config, "candidate", canary.id, attempt) % config.space, config)
        attempt += 1
        if secret != canary.secret:
            found.append(secret)
    return found


def assign_to_chunks(canaries: list[Canary], config: CanaryConfig, chunks: list[Chunk]) -> dict[int, list[Canary]]:
    """Return the included canaries by the number of the chunk whose documents they are packed with, drawn at random in
    proportion to the chunks' documents."""
    ends = np.array([chunk.end for chunk in chunks])
    canaries_of_chunk: dict[int, list[Canary]] = {}
    for canary in canaries:
        if canary.included:
            position = _number(config, "place", canary.id) % int(ends[-1])
            chunk = chunks[int(np.searchsorted(ends, position, side="right"))]
            canaries_of_chunk.setdefault(chunk.number, []).append(canary)
    return canaries_of_chunk


def check_canaries(
    canaries: list[Canary], config: CanaryConfig, staged: Staged, tokenizer: PreTrainedTokenizerBase, block_length: int
) -> None:
    """Refuse canaries that could not be told from documents, or would be cut.

    Raises:
        UnusableCorpusError: the source holds the text of a canary, or one is longer than a block.
    """
    exact = {exact_digest(canary.text): canary.id for canary in canaries}
    known = np.array(sorted(exact), dtype=f"S{EXACT_BYTES}")
    for first in range(0, staged.documents, STAGED_AT_ONCE):
        docs = np.arange(first, min(first + STAGED_AT_ONCE, staged.documents))
        digests = fixed_width(staged.take(docs, ["exact"]), "exact", np.uint8)
        found = np.isin(np.ascontiguousarray(digests).view(f"S{EXACT_BYTES}").ravel(), known)
        if found.any():
            number = first + int(np.flatnonzero(found)[0])
            raise UnusableCorpusError(
                f"data.canaries: document {number} of the source (from 0) is a canary of seed {config.seed} word for "
                "word, so nobody could say whether that one was left out; use another data.canaries.seed"
            )
    longest = max(map(len, encode(tokenizer, [canary.text for canary in canaries])))
    if longest > block_length:
        raise UnusableCorpusError(
            f"data.canaries.length: a canary has {longest} tokens, more than the {block_length} of a block "
            "(data.block_length); choose shorter secrets or longer blocks"
        )


def write_canaries(canaries: list[Canary], folder: Path) -> CanariesEntry:
    """Write ``canaries.jsonl``, one object per line, and return its manifest entry."""
    path = folder / CANARIES
    write_text(path, "".join(canary.model_dump_json() + "\n" for canary in canaries))
    return CanariesEntry(
        file=CANARIES,
        count=len(canaries),
        included=sum(canary.included for canary in canaries),
        sha256=file_sha256(path),
    )


def load_canaries(data_dir: str | Location, manifest: Manifest) -> list[Canary]:
    """Return the canaries of a prepared folder, by number; none if it was prepared without.

    Raises:
        DataError: the file is missing or altered.
    """
    entry, location = manifest.canaries, location_of(data_dir)
    if entry is None:
        return []
    if isinstance(location, RemoteFolder):
        return location.open(RemoteFile(entry.file, entry.sha256), _read)
    path = location / entry.file
    if not path.is_file() or file_sha256(path) != entry.sha256:
        raise DataError(f"{path}: missing or altered; restore it, or remove the folder and run `dualtok prepare` again")
    return _read(path)


def canary_config(manifest: Manifest) -> CanaryConfig:
    """Return the settings that a folder's canaries were drawn with.

    Raises:
        DataError: the manifest does not hold them.
    """
    settings: Any = manifest.config.get("canaries")
    try:
        return TypeAdapter(CanaryConfig).validate_python(settings)
    except ValidationError:
        raise DataError(
            f"manifest: no usable settings of its canaries ({json.dumps(settings)[:80]}); prepare the data again"
        ) from None


def _read(path: Path) -> list[Canary]:
    return [Canary.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _text(config: CanaryConfig, number: int, attempt: int) -> tuple[str, str, str]:
    """Return (prefix, secret, text) of a canary's n-th drawing."""
    prefix = config.prefix.replace("{name}", _name(_number(config, "name", number, attempt)))
    secret = secret_of(_number(config, "secret", number, attempt) % config.space, config)
    return prefix, secret, f"{prefix} {secret}"


def _name(index: int) -> str:
    """Return a word that no language has, of four syllables out of 85: 52 million."""
    parts = []
    for _ in range(NAME_SYLLABLES):
        index, position = divmod(index, len(SYLLABLES))
        parts.append(SYLLABLES[position])
    return "".join(parts).capitalize()


def _number(config: CanaryConfig, purpose: str, *parts: int) -> int:
    """Return a uniform number below 2^512 for one purpose; numbers of different purposes are independent."""
    message = "/".join([purpose, *map(str, parts)]).encode()
    keyed = hashlib.blake2b(message, key=str(config.seed).encode(), digest_size=64, person=b"dualtok-canary")
    return int.from_bytes(keyed.digest(), "big")
