"""What deduplication needs of a document, made in worker processes: a digest of its normalized text and a MinHash
signature, and the keys under which similar documents meet.

Legend: d documents, p permutations, b bands, r rows of a band.
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from datasketch import MinHashLSH

from dualtok.data.hashing import scrambled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.config.data import DataConfig

MINHASH_SEED = 1
BAND_WEIGHTS = (0.1, 0.9)
"""What false candidates and missed pairs weigh when the bands are chosen."""
EXACT_BYTES = 16
SHINGLES_AT_ONCE = 1 << 14
CHARACTERS_PER_WORD = 2
"""What a word counts in characters of a script without spaces, most of whose words have one or two."""
WITHOUT_SPACES = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19DF),
    (0x1A20, 0x1AAF),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),
    (0xA980, 0xA9DF),
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x20000, 0x3FFFF),
)
"""Code points of scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Tai, kana, Chinese
characters, Yi, Javanese."""
HASHES_AT_ONCE = 512
"""Keeps the [p, n] products of a signature in the processor's cache."""


class Sketch(NamedTuple):
    """What the search for duplicates needs of a document."""

    exact: bytes
    """Digest of the normalized text."""
    signature: NDArray[np.uint32] | None
    """MinHash values [p], or None when near duplicates are kept."""
    of_characters: bool = False
    """Whether its n-grams are of characters, for want of spaces between words."""


class _Constants(NamedTuple):
    """Random odd multipliers and offsets, the same in every process and version of NumPy."""

    byte: NDArray[np.uint64]
    base: np.uint64
    multiply: NDArray[np.uint64]
    add: NDArray[np.uint64]


def normalized(text: str) -> str:
    """Return the text in Unicode NFC with every run of white space as one space: what "exact duplicate" compares."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_digest(text: str) -> bytes:
    """Return the digest of the normalized text, which exact duplicates share."""
    return _digest(normalized(text).encode("utf-8"))


def _digest(plain: bytes) -> bytes:
    return hashlib.blake2b(plain, digest_size=EXACT_BYTES).digest()


def sketch(text: str, config: DataConfig) -> Sketch:
    """Return a document's sketch."""
    plain = normalized(text).encode("utf-8")
    exact = _digest(plain)
    if config.near_duplicate_threshold is None:
        return Sketch(exact, None)
    letters = np.frombuffer(plain, dtype=np.uint8)
    of_characters = is_without_spaces(letters)
    starts, ends = _characters(letters) if of_characters else _words(letters)
    width = config.shingle_words * (CHARACTERS_PER_WORD if of_characters else 1)
    return Sketch(exact, _signature(letters, starts, ends, width, config.permutations), of_characters)


def is_without_spaces(letters: NDArray[np.uint8]) -> bool:
    """Return whether most characters of a UTF-8 text are of scripts that put no spaces between words."""
    if not len(letters) or letters.max() < 0xE0:  # no character of three bytes or more
        return False
    starts, _ = _characters(letters)
    lead = letters[starts].astype(np.int64)
    three, four = starts[lead >> 4 == 0xE], starts[lead >> 3 == 0x1E]
    tail = [letters[three + position].astype(np.int64) & 0x3F for position in (1, 2)]
    codes = [((letters[three].astype(np.int64) & 0xF) << 12) | (tail[0] << 6) | tail[1]]
    tail = [letters[four + position].astype(np.int64) & 0x3F for position in (1, 2, 3)]
    codes.append(((letters[four].astype(np.int64) & 0x7) << 18) | (tail[0] << 12) | (tail[1] << 6) | tail[2])
    every = np.concatenate(codes)
    edges = np.array(WITHOUT_SPACES).ravel() + np.tile([0, 1], len(WITHOUT_SPACES))
    found = np.count_nonzero(np.searchsorted(edges, every, side="right") % 2)
    return bool(2 * found > len(starts) - np.count_nonzero(lead == ord(" ")))


def _characters(letters: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each character of a UTF-8 text begins and ends."""
    starts = np.flatnonzero((letters & 0xC0) != 0x80)
    return starts, np.append(starts[1:], len(letters))


def _words(letters: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each word of a normalized text begins and ends."""
    spaces = np.flatnonzero(letters == ord(" "))
    return np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [len(letters)]])


def key_count(config: DataConfig) -> int:
    """Return how many keys :func:`keys` makes of each document."""
    return 1 if config.near_duplicate_threshold is None else 1 + _bands(config)[0]


def keys(exact: NDArray[np.uint8], signatures: NDArray[np.uint32] | None, config: DataConfig) -> NDArray[np.uint64]:
    """Return the keys of documents: one of the whole text, and one per band of the signature.

    Documents that are equal, or similar enough to be compared, share a key; a few others do by chance.

    Args:
        exact: digests [d, 16].
        signatures: [d, p], or None when near duplicates are kept.
        config: threshold and permutations.

    Returns:
        [d, 1 + b].
    """
    whole = np.ascontiguousarray(exact[:, :8]).view(np.uint64)
    if signatures is None:
        return whole
    bands, rows = _bands(config)
    values = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    weights = _constants(bands * rows).multiply.reshape(bands, rows)
    return np.concatenate([whole, scrambled((values * weights).sum(axis=2, dtype=np.uint64))], axis=1)


@lru_cache(maxsize=4)
def _bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    # datasketch chooses the bands for this threshold; its own storages are memory or a server. A candidate is compared
    # by its whole signature, so a false one costs time only and misses weigh more: even weights would find 40 % of the
    # pairs at a similarity of .8 and 93 % at .9, these find 87 % and 99.9 %.
    try:
        lsh = MinHashLSH(threshold=threshold, num_perm=permutations, weights=BAND_WEIGHTS)
    except ValueError:  # it would take one band, and refuses that: two halves find all that one would
        return 2, permutations // 2
    return int(lsh.b), int(lsh.r)


def _bands(config: DataConfig) -> tuple[int, int]:
    assert config.near_duplicate_threshold is not None
    return _bands_for(config.near_duplicate_threshold, config.permutations)


@lru_cache(maxsize=4)
def _constants(count: int) -> _Constants:
    draw = np.random.RandomState(MINHASH_SEED)  # its streams are frozen, those of default_rng are not
    numbers = [draw.randint(0, 2**64, size=size, dtype=np.uint64) for size in (256, 1, count, count)]
    byte, base, multiply, add = numbers
    return _Constants(byte | np.uint64(1), base[0] | np.uint64(5), multiply | np.uint64(1), add)


def _signature(
    letters: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], width: int, permutations: int
) -> NDArray[np.uint32]:
    """Return the MinHash signature of the set of n-grams: for each permutation the least hash of an n-gram.

    Args:
        letters: bytes of the text.
        starts: where its words, or its characters, begin.
        ends: where they end.
        width: n.
        permutations: p.

    Written out because datasketch calls a Python hash per n-gram. The family is multiply-shift, (a x + b) >> 32 of a
    32-bit x, pairwise independent as datasketch's own.
    """
    constants = _constants(permutations)
    lowest = np.full(permutations, np.iinfo(np.uint64).max, dtype=np.uint64)
    space = np.empty((permutations, HASHES_AT_ONCE), dtype=np.uint64)
    width = min(width, len(starts))
    for first in range(0, len(starts) - width + 1, SHINGLES_AT_ONCE):
        here = starts[: len(starts) - width + 1][first : first + SHINGLES_AT_ONCE]
        there = ends[width - 1 :][first : first + SHINGLES_AT_ONCE]
        hashes = _substring_hashes(letters[here[0] : there[-1]], here - here[0], there - here[0]) >> np.uint64(32)
        for some in range(0, len(hashes), HASHES_AT_ONCE):
            part = hashes[some : some + HASHES_AT_ONCE]
            products = space[:, : len(part)]
            np.multiply(constants.multiply[:, None], part, out=products)
            np.add(products, constants.add[:, None], out=products)
            np.minimum(lowest, products.min(axis=1), out=lowest)
    return (lowest >> np.uint64(32)).astype(np.uint32)  # a shift keeps the order, so the least may be shifted


def _substring_hashes(
    letters: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each substring: differences of one running polynomial modulo 2^64, scrambled."""
    powers, inverses = _powers(max(1 << 16, 1 << len(letters).bit_length()))
    running = np.zeros(len(letters) + 1, dtype=np.uint64)
    np.cumsum(_constants(1).byte[letters] * powers[: len(letters)], out=running[1:])
    return scrambled((running[ends] - running[starts]) * inverses[starts])


@lru_cache(maxsize=2)
def _powers(length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers 0 .. length-1 of the base and of its inverse modulo 2^64."""
    base = int(_constants(1).base)

    def powers_of(number: int) -> NDArray[np.uint64]:
        factors = np.full(length, number, dtype=np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return powers_of(base), powers_of(pow(base, -1, 2**64))
