"""What deduplication needs of a document, made in worker processes: a digest of its normalised text and a MinHash
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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dualtok.data.config import DataConfig

MINHASH_SEED = 1
BAND_WEIGHTS = (0.1, 0.9)
"""What false candidates and missed pairs weigh when the bands are chosen."""
EXACT_BYTES = 16
SHINGLES_AT_ONCE = 1 << 14
HASHES_AT_ONCE = 512
"""Keeps the [p, n] products of a signature in the processor's cache."""


class Sketch(NamedTuple):
    """What the search for duplicates needs of a document."""

    exact: bytes
    """Digest of the normalised text."""
    signature: NDArray[np.uint32] | None
    """MinHash values [p], or None when near duplicates are kept."""


class _Constants(NamedTuple):
    """Random odd multipliers and offsets, the same in every process and version of NumPy."""

    byte: NDArray[np.uint64]
    base: np.uint64
    multiply: NDArray[np.uint64]
    add: NDArray[np.uint64]


def normalised(text: str) -> str:
    """Return the text in Unicode NFC with every run of white space as one space: what "exact duplicate" compares."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_digest(text: str) -> bytes:
    """Return the digest of the normalised text, which exact duplicates share."""
    return _digest(normalised(text).encode("utf-8"))


def _digest(plain: bytes) -> bytes:
    return hashlib.blake2b(plain, digest_size=EXACT_BYTES).digest()


def sketch(text: str, config: DataConfig) -> Sketch:
    """Return a document's sketch."""
    plain = normalised(text).encode("utf-8")
    exact = _digest(plain)
    if config.near_duplicate_threshold is None:
        return Sketch(exact, None)
    return Sketch(exact, _signature(plain, config.shingle_words, config.permutations))


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
    return np.concatenate([whole, _mixed((values * weights).sum(axis=2, dtype=np.uint64))], axis=1)


@lru_cache(maxsize=4)
def _bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    # datasketch chooses the bands for this threshold; its own storages are memory or a server. A candidate is compared
    # by its whole signature, so a false one costs time only and misses weigh more: even weights would find 40 % of the
    # pairs at a similarity of .8 and 93 % at .9, these find 87 % and 99.9 %.
    lsh = MinHashLSH(threshold=threshold, num_perm=permutations, weights=BAND_WEIGHTS)
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


def _signature(plain: bytes, width: int, permutations: int) -> NDArray[np.uint32]:
    """Return the MinHash signature of the set of word n-grams: for each permutation the least hash of an n-gram.

    Written out because datasketch calls a Python hash per n-gram. The family is multiply-shift, (a x + b) >> 32 of a
    32-bit x, pairwise independent as datasketch's own.
    """
    constants = _constants(permutations)
    lowest = np.full(permutations, np.iinfo(np.uint64).max, dtype=np.uint64)
    space = np.empty((permutations, HASHES_AT_ONCE), dtype=np.uint64)
    letters = np.frombuffer(plain, dtype=np.uint8)
    spaces = np.flatnonzero(letters == ord(" "))
    starts, ends = np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [len(letters)]])
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
    return _mixed((running[ends] - running[starts]) * inverses[starts])


@lru_cache(maxsize=2)
def _powers(length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers 0 .. length-1 of the base and of its inverse modulo 2^64."""
    base = int(_constants(1).base)

    def powers_of(number: int) -> NDArray[np.uint64]:
        factors = np.full(length, number, dtype=np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return powers_of(base), powers_of(pow(base, -1, 2**64))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble numbers one to one, so that each bit depends on all (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
