"""Settings of the prepared data: where it lies, and how ``dualtok prepare`` makes it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.errors import did_you_mean

SplitName = Literal["train", "reference", "attack_reference", "probe", "validation", "held_out"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Count = Annotated[int, Field(ge=1)]
ROUNDING = 1e-9
MIX_PERIOD = 1000
"""Samples of a lane over which the shares of mixed folders hold exactly; a share is rounded to 1 in so many."""


def default_shares() -> dict[str, float]:
    """Return the default share of each split."""
    return {
        "train": 0.6,
        "reference": 0.12,
        "attack_reference": 0.12,
        "probe": 0.02,
        "validation": 0.04,
        "held_out": 0.1,
    }


@dataclass(config=ConfigDict(extra="forbid"))
class MixConfig:
    """A further prepared folder to train on."""

    dir: str
    """The folder; of the same tokenizer, ``block_length`` and ``lanes``."""

    weight: Annotated[float, Field(ge=1 / MIX_PERIOD, lt=1)]
    """Its share of the samples, whatever its size."""


@dataclass(config=ConfigDict(extra="forbid"))
class DataConfig:
    """One prepared data folder."""

    dir: str
    """Folder of the prepared data: ``prepare`` writes it, every other verb reads it."""

    source: str | None = None
    """What ``prepare`` reads: a .txt, .jsonl or .parquet file, a folder of them, or the name of a ``datasets``
    dataset."""

    field: str = "text"
    """Key or column that holds the text; .txt files have none."""

    txt_documents: Literal["file", "paragraph"] = "file"
    """Whether a .txt file is one document, or each of its paragraphs (separated by blank lines) is one."""

    dataset_config: str | None = None
    """Configuration of a ``datasets`` dataset."""

    dataset_split: str = "train"
    """Split of a ``datasets`` dataset to stream."""

    min_characters: Annotated[int, Field(ge=0)] = 0
    """Shorter documents are left out."""

    max_documents: Count | None = None
    """Read at most so many documents of the source."""

    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = dataclasses.field(default_factory=default_shares)
    """Share of the documents in each split; together at most 1, the rest is left out. A document's split depends on its
    own text and ``seed`` alone."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split."""

    near_duplicate_threshold: Annotated[float, Field(gt=0, lt=1)] | None = 0.8
    """Documents whose sets of word n-grams have at least this (estimated) Jaccard similarity count as one; null keeps
    them."""

    shingle_words: Count = 5
    """Words per n-gram."""

    permutations: Annotated[int, Field(ge=16)] = 128
    """Hash functions of a MinHash signature."""

    tokenizer: str | None = None
    """Folder or hub name of a Hugging Face tokenizer, or a SentencePiece ``.model`` file. Without it a byte-level BPE
    is trained on the split ``reference``, so that it has seen no private document."""

    vocab_size: Annotated[int, Field(ge=260)] | None = None
    """Ids of the tokenizer that is trained: 4096 unless given; an error together with ``tokenizer``."""

    block_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per block."""

    lanes: Count = 64
    """Lanes L of each split: sample i comes from lane i mod L, and each shard belongs to one lane. A global micro-batch
    that divides L lets every lane be read by one rank."""

    rows_per_shard: Count = 1024
    """Most blocks per shard."""

    mix: tuple[MixConfig, ...] = ()
    """Further prepared folders whose split ``train.split`` is mixed into training; ``dir`` gets the share that they
    leave. Evaluations and the audit concern ``dir`` alone."""

    processes: Count = 1
    """Processes that hash, tokenise and pack. The result does not depend on it."""

    def __post_init__(self) -> None:
        """Refuse unknown splits and shares above 1."""
        for name in self.shares:
            if name not in SPLITS:
                raise ValueError(
                    f"data.shares: no split {name!r}{did_you_mean(name, SPLITS)}; splits are {', '.join(SPLITS)}"
                )
        total = sum(self.shares.values())
        if total > 1 + ROUNDING:
            raise ValueError(f"data.shares: sum to {total:g}, above 1")
        self._check_mix()
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                "data.vocab_size: has no effect with data.tokenizer, which has its own vocabulary; remove it"
            )
        if "train" not in self.shares:
            raise ValueError("data.shares: need at least a share of 'train'")
        if self.tokenizer is None and "reference" not in self.shares:
            raise ValueError("data.tokenizer: missing, and data.shares has no 'reference' to train one on; give either")

    def _check_mix(self) -> None:
        rest = 1 - sum(other.weight for other in self.mix)
        if rest < 1 / MIX_PERIOD - ROUNDING:
            raise ValueError(
                f"data.mix: the weights sum to {1 - rest:g}, which leaves less than {1 / MIX_PERIOD:g} to data.dir; "
                "they are shares of all samples, lower them"
            )
        folders = [self.dir, *(other.dir for other in self.mix)]
        for number, folder in enumerate(folders):
            if folder.rstrip("/") in {earlier.rstrip("/") for earlier in folders[:number]}:
                raise ValueError(f"data.mix: {folder} is there twice; give each folder once")
