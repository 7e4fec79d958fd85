"""Canaries: made-up documents, each put into the split ``train`` or kept out by the toss of a fair coin of its own.

A run on the folder then has members and non-members whose membership is random and known, which is what a
lower bound on epsilon needs (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846), and secrets out of a space that is
known, which is what exposure needs (Carlini et al. 2019, arXiv 1802.08232).

Coins, places, and texts with a secret are keyed hashes of ``data.canaries``, so any process on any host draws the same.
Tokens that are rare in the source depend on the source as well, and sampled text on a model: it is kept beside what is
staged until the folder is whole, so that a second start goes on with the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

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
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from dualtok.config.data import DataConfig
    from dualtok.data.manifest import Manifest

    TextSampler = Callable[[CanaryConfig], list[str]]
    """From settings to as many texts as there are canaries."""

CANARIES = "canaries.jsonl"
SAMPLED = "canary-texts.json"
"""What a model sampled, beside what is staged."""
SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou"]
NAME_SYLLABLES = 4
STAGED_AT_ONCE = 1 << 16


class CanaryText(NamedTuple):
    """What a canary is, before its coin is tossed; see :class:`Canary`."""

    prefix: str
    secret: str
    text: str


class Canary(BaseModel):
    """One line of ``canaries.jsonl``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    """Number of the canary, from 0."""
    prefix: str
    """What comes before the secret; empty if there is none."""
    secret: str
    """The symbols that were drawn, separated by spaces, or the text of the token; empty if there is none."""
    text: str
    """The whole document: prefix, a space, secret; or what was sampled."""
    included: bool
    """How its coin fell: whether it is a document of the split ``train``."""
    doc: int | None
    """Its number as a document, or None if it was kept out."""


def made_canaries(
    config: DataConfig,
    staged: Staged,
    first_document: int,
    tokenizer: PreTrainedTokenizerBase,
    count: Callable[[], NDArray[np.int64]],
) -> tuple[list[Canary], int | None]:
    """Return the canaries of a preparation, checked; none if it has none.

    Args:
        config: the ``data`` section.
        staged: what was read; sampled texts must lie beside it.
        first_document: number of the first canary that is included.
        tokenizer: of the data.
        count: returns how often each id occurs in the documents; called where that matters.

    Returns:
        The canaries, and :attr:`.CanariesEntry.seen`.

    Raises:
        UnusableCorpusError: as :func:`check_canaries`, :func:`sampled_texts` and :func:`rare_token_texts`.
    """
    settings, texts, seen = config.canaries, None, None
    if settings is None:
        return [], None
    if settings.kind == "high_temperature":
        texts = sampled_texts(settings, None, staged.at.folder / SAMPLED)
    elif settings.kind == "new_tokens":
        texts, seen = rare_token_texts(settings, tokenizer, count())
    canaries = draw_canaries(settings, first_document, texts)
    check_canaries(canaries, settings, staged, tokenizer, config.block_length)
    return canaries, seen


def draw_canaries(config: CanaryConfig, first_document: int, texts: Sequence[CanaryText] | None = None) -> list[Canary]:
    """Draw coins, and texts if they are not given.

    Args:
        config: how many, and of which kind.
        first_document: number of the first canary that is included; the source has lower ones.
        texts: one per canary, as :func:`sampled_texts` and :func:`rare_token_texts` return them; None draws secrets.

    Returns:
        The canaries, by number. All texts differ.
    """
    canaries: list[Canary] = []
    document = first_document
    for number, (prefix, secret, text) in enumerate(secret_texts(config) if texts is None else texts):
        included = bool(_number(config, "coin", number) % 2)
        canaries.append(
            Canary(
                id=number,
                prefix=prefix,
                secret=secret,
                text=text,
                included=included,
                doc=document if included else None,
            )
        )
        document += included
    return canaries


def secret_texts(config: CanaryConfig) -> list[CanaryText]:
    """Draw prefixes and secrets of the kinds ``digits`` and ``words``."""
    found: dict[str, CanaryText] = {}
    for number in range(config.count):
        attempt = 0
        while (drawn := _text(config, number, attempt)).text in found:
            attempt += 1
        found[drawn.text] = drawn
    return list(found.values())


def sampled_texts(config: CanaryConfig, sampler: TextSampler | None, kept: Path) -> list[CanaryText]:
    """Return the texts of the kind ``high_temperature``, sampled once and kept in a file.

    Args:
        config: how many, by which model.
        sampler: what samples them.
        kept: the file.

    Raises:
        DataError: nothing samples.
        UnusableCorpusError: two of the texts are the same, or one is empty.
    """
    if not kept.is_file():
        if sampler is None:
            raise DataError(
                "data.canaries.kind: high_temperature needs a model that samples, which `dualtok prepare` loads; from "
                "Python give prepare() one, e.g. dualtok.commands.prepare.sample_texts"
            )
        write_text(kept, json.dumps(sampler(config)))
    texts: list[str] = json.loads(kept.read_text(encoding="utf-8"))
    if not all(texts) or len(set(texts)) < len(texts):
        raise UnusableCorpusError(
            "data.canaries.temperature: the model sampled the same text twice, or an empty one; raise it, or "
            "data.canaries.tokens"
        )
    return [CanaryText("", "", text) for text in texts]


def rare_token_texts(
    config: CanaryConfig, tokenizer: PreTrainedTokenizerBase, counts: NDArray[np.int64]
) -> tuple[list[CanaryText], int]:
    """Return the texts of the kind ``new_tokens``, each with a token of its own, the rarest ones first.

    A token is taken if it is exactly what its text adds to the prefix. The paper adds tokens to the model's vocabulary
    instead, which no other document can contain.

    Args:
        config: how many, and the prefix.
        tokenizer: of the data.
        counts: how often each id occurs in the documents [vocabulary].

    Returns:
        The texts, and how often the commonest of their tokens occurs.

    Raises:
        UnusableCorpusError: the tokenizer has too few such tokens.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    order = sorted(range(len(counts)), key=lambda token: (counts[token], _number(config, "token", token)))
    rarest = iter([token for token in order if token not in special])
    texts: list[CanaryText] = []
    token = -1
    for number in range(config.count):
        prefix = _prefix(config, number, 0)
        before = encode(tokenizer, [prefix])[0]
        for token in rarest:
            secret = str(tokenizer.decode([token])).strip()
            text = f"{prefix} {secret}"
            if secret and encode(tokenizer, [text])[0] == [*before[:-1], token, before[-1]]:
                texts.append(CanaryText(prefix, secret, text))
                break
        else:
            raise UnusableCorpusError(
                f"data.canaries.count: the tokenizer has only {len(texts)} tokens that are a word of their own after "
                f"the prefix, too few for {config.count} canaries of new_tokens; lower it"
            )
    return texts, int(counts[token])


def uniform(config: CanaryConfig, number: int, step: int) -> float:
    """Return the number of [0, 1) that decides which token is sampled at a step of a canary."""
    return (_number(config, "sample", number, step) >> (512 - 53)) / 2.0**53


def secret_of(index: int, config: CanaryConfig) -> str:
    """Return the secret of this number, from 0 to ``config.space - 1``: its digits in the base of the alphabet."""
    symbols = SYMBOLS[config.kind]
    drawn = []
    for _ in range(config.length):
        index, position = divmod(index, len(symbols))
        drawn.append(symbols[position])
    return " ".join(reversed(drawn))


def candidates(canary: Canary, config: CanaryConfig, count: int) -> list[str]:
    """Return secrets that a canary of the kinds ``digits`` and ``words`` might have had instead, without its own.

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
        setting = {"high_temperature": "tokens", "new_tokens": "prefix"}.get(config.kind, "length")
        raise UnusableCorpusError(
            f"data.canaries.{setting}: a canary has {longest} tokens, more than the {block_length} of a block "
            "(data.block_length); choose shorter canaries or longer blocks"
        )


def write_canaries(canaries: list[Canary], folder: Path, seen: int | None = None) -> CanariesEntry:
    """Write ``canaries.jsonl``, one object per line, and return its manifest entry."""
    path = folder / CANARIES
    write_text(path, "".join(canary.model_dump_json() + "\n" for canary in canaries))
    return CanariesEntry(
        file=CANARIES,
        count=len(canaries),
        included=sum(canary.included for canary in canaries),
        sha256=file_sha256(path),
        seen=seen,
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


def _text(config: CanaryConfig, number: int, attempt: int) -> CanaryText:
    """Return prefix, secret and text of a canary's n-th drawing."""
    prefix = _prefix(config, number, attempt)
    secret = secret_of(_number(config, "secret", number, attempt) % config.space, config)
    return CanaryText(prefix, secret, f"{prefix} {secret}")


def _prefix(config: CanaryConfig, number: int, attempt: int) -> str:
    return config.prefix.replace("{name}", _name(_number(config, "name", number, attempt)))


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
