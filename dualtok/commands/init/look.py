"""A look at documents that are not prepared: how many there are, how many tokens, how many are there twice."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING

import numpy as np

from dualtok.data.prepare.deduplicate import exact_digest, keys, sketch
from dualtok.data.sources.documents import read_documents
from dualtok.data.tokenizer import read_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.config.data import DataConfig

MOST_DOCUMENTS = 100_000
"""Documents that are read at most."""
SAMPLE = 2_000
"""Documents, from the first on, that are tokenized and compared with each other."""
SAMPLE_CHARACTERS = 4_000_000
VOCABULARIES = ((300_000_000, 32_000), (30_000_000, 8192), (3_000_000, 4096), (0, 1024))
"""Characters of all documents from which on a new tokenizer has so many ids."""


@dataclass(frozen=True)
class Look:
    """What was found."""

    documents: int
    """Different ones that were read."""
    whole: bool
    """Whether all documents were read."""
    tokens: int
    """Of these documents, from the tokens per character of the sample."""
    longest: int
    """Tokens that 9 of 10 documents of the sample do not exceed."""
    exact: int
    """Exact duplicates that were read."""
    near: int
    """Documents of the sample that are near duplicates of an earlier one."""
    sampled: int
    vocabulary: int | None
    """Ids of a tokenizer that is to be trained; None where there is one."""

    @property
    def text(self) -> str:
        """What was found, in a line."""
        at_least = "" if self.whole else "at least "
        return (
            f"{at_least}{self.documents:,} documents, about {self.tokens:,} tokens; {self.exact:,} exact duplicates, "
            f"and {self.near:,} near ones among the first {self.sampled:,}"
        )


def look_at(config: DataConfig) -> Look:
    """Read the documents of ``config.source``, or the first of them.

    Tokens are those of ``config.tokenizer``, or of one that is trained on the sample as ``prepare`` would.

    Raises:
        DataError: the documents or the tokenizer cannot be read.
    """
    digests: set[bytes] = set()
    sample: list[str] = []
    characters = exact = sampled_characters = read = 0
    for document in islice(read_documents(config), MOST_DOCUMENTS + 1):
        read += 1
        if read > MOST_DOCUMENTS:
            break
        digest = exact_digest(document.text)
        if digest in digests:
            exact += 1
            continue
        digests.add(digest)
        characters += len(document.text)
        if len(sample) < SAMPLE and sampled_characters < SAMPLE_CHARACTERS:
            sample.append(document.text)
            sampled_characters += len(document.text)
    vocabulary = None
    if config.tokenizer is None:
        vocabulary = next(ids for least, ids in VOCABULARIES if characters >= least)
    lengths = _lengths(sample, config.tokenizer, vocabulary)
    return Look(
        documents=len(digests),
        whole=read <= MOST_DOCUMENTS,
        tokens=round(characters * sum(lengths) / max(1, sampled_characters)),
        longest=int(np.quantile(lengths, 0.9)) if lengths else 0,
        exact=exact,
        near=near_duplicates(sample, config),
        sampled=len(sample),
        vocabulary=vocabulary,
    )


def _lengths(sample: Sequence[str], named: str | None, vocabulary: int | None) -> list[int]:
    """Return the tokens of each document of the sample, by a tokenizer that is named or trained on it."""
    if not sample:
        return []
    tokenizer = train_tokenizer(sample, vocabulary or 0) if named is None else read_tokenizer(named)
    return [len(ids) for ids in tokenizer(list(sample), add_special_tokens=False)["input_ids"]]


def near_duplicates(texts: Sequence[str], config: DataConfig) -> int:
    """Return how many texts are near duplicates of an earlier one, as ``dualtok prepare`` finds them."""
    if config.near_duplicate_threshold is None or len(texts) < 2:
        return 0
    sketches = [sketch(text, config) for text in texts]
    exact = np.array([np.frombuffer(each.exact, dtype=np.uint8) for each in sketches])
    signatures = np.array([each.signature for each in sketches])
    by_key: dict[int, list[int]] = {}
    for number, row in enumerate(keys(exact, signatures, config)):
        for key in row.tolist():
            by_key.setdefault(key, []).append(number)
    pairs = {pair for group in by_key.values() if len(group) > 1 for pair in combinations(group[:50], 2)}
    similar = {
        later
        for earlier, later in pairs
        if (signatures[earlier] == signatures[later]).mean() >= config.near_duplicate_threshold
    }
    return len(similar)
