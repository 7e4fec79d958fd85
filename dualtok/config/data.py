"""Settings of the prepared data: where it lies, and how ``dualtok prepare`` makes it."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.config.canaries import CanaryConfig
from dualtok.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

SplitName = Literal["train", "reference", "attack_reference", "auxiliary", "validation", "held_out"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Count = Annotated[int, Field(ge=1)]
ROUNDING = 1e-9
MIX_PERIOD = 1000
"""Samples of a lane over which the shares of mixed folders hold exactly; a share is rounded to 1 in so many."""
SCHEDULING = ("processes", "mix", "stream", "on_bad_shard")
"""Settings that do not change what ``dualtok prepare`` makes."""


def default_shares() -> dict[str, float]:
    """Return the default share of each split."""
    return {
        "train": 0.6,
        "reference": 0.12,
        "attack_reference": 0.12,
        "auxiliary": 0.02,
        "validation": 0.04,
        "held_out": 0.1,
    }


SECRET = re.compile(r"key|secret|token|passw|credential|authori[sz]ation|cookie|signature", re.IGNORECASE)
"""Names of options that hold a secret; it must not be written to ``run.yaml``."""
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Names of environment variables; hardly a secret is one."""


def is_address(folder: str) -> bool:
    """Return whether a folder's name is an address like ``s3://bucket/prepared`` and not a local path."""
    return "://" in folder


@dataclass(config=ConfigDict(extra="forbid"))
class StreamConfig:
    """How prepared data at an address (``s3://``, ``gs://``, ``hf://``, ``https://``) is read."""

    cache_dir: str | None = None
    """Folder on a local disk of each host where shards are kept, shared by all ranks and jobs of the host; without it
    ``$XDG_CACHE_HOME/dualtok``, that is ``~/.cache/dualtok``."""

    cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 64.0
    """Most GiB that the cache keeps; what was used longest ago goes first."""

    prefetch: Annotated[int, Field(ge=0)] = 32
    """Shards that each reader (a rank, or each of its data workers) fetches in the background before it needs them.
    Unit: shards."""

    attempts: Count = 8
    """Most attempts to read one object. Unit: attempts."""

    retry_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """No further attempt starts later than so many seconds after the first. The pauses between attempts grow twofold,
    up to 30 seconds, each drawn at random below its bound."""

    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds without a byte after which an attempt is given up."""

    endpoint_url: str | None = None
    """Only ``s3://``: URL of a server other than Amazon's."""

    storage_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further options of the fsspec file system, e.g. ``{anon: true}``. They are written to ``run.yaml``, so that
    options that hold a secret are refused here."""

    storage_environment: dict[str, str] = dataclasses.field(default_factory=dict)
    """Options whose values are secrets: option -> name of the environment variable that holds it on every rank. Not
    needed where the file system finds its credentials by itself, as s3fs does in ``AWS_ACCESS_KEY_ID`` and others."""

    def __post_init__(self) -> None:
        """Refuse secrets, without repeating them."""
        for name in _option_names(self.storage_options):
            if SECRET.search(name):
                raise ValueError(
                    f"data.stream.storage_options: {name!r} would be written to run.yaml; put it into an environment "
                    "variable and name that under data.stream.storage_environment"
                )
        for name, variable in self.storage_environment.items():
            if not VARIABLE.fullmatch(variable):
                raise ValueError(
                    f"data.stream.storage_environment.{name}: needs the name of an environment variable (capitals, "
                    "digits, _), not the value itself"
                )
        if self.endpoint_url is not None:
            require_no_secret(self.endpoint_url, "data.stream.endpoint_url")


def _option_names(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield str(name)
        if isinstance(value, dict):
            yield from _option_names(value)


def require_no_secret(address: str, setting: str) -> None:
    """Refuse an address with a password or a signature, without repeating it.

    Raises:
        ValueError: it has one.
    """
    # A password may hold a slash, so that it is not all in the part before the first; hf:// has "@" before a revision.
    if ("@" in address and not address.startswith("hf://")) or urlsplit(address).query:
        raise ValueError(
            f"{setting}: the address holds a user name or a query, which would be written to run.yaml; leave them out "
            "and give credentials by data.stream.storage_environment"
        )


@dataclass(config=ConfigDict(extra="forbid"))
class MixConfig:
    """A further prepared folder to train on."""

    dir: str
    """The folder; of the same tokenizer, ``block_length`` and ``lanes``."""

    weight: Annotated[float, Field(ge=1 / MIX_PERIOD, lt=1)]
    """Its share of the samples, whatever its size. Unit: share, 0 to 1."""


@dataclass(config=ConfigDict(extra="forbid"))
class DataConfig:
    """One prepared data folder."""

    dir: str
    """Folder of the prepared data: ``prepare`` writes it, every other verb reads it. Those also take an address of a
    copy of the folder, like ``s3://bucket/prepared``."""

    source: str | None = None
    """What ``prepare`` reads: a file of text, JSON, CSV or Parquet (docs/data.md has the endings), a folder of them, or
    the name of a ``datasets`` dataset."""

    field: str = "text"
    """Key or column that holds the text; .txt files have none."""

    rows: Literal["auto", "text", "chat"] = "auto"
    """What a row is: a text in ``field``, or a conversation in ``messages`` (with ``tools``, if any) or in ``prompt``
    and ``completion``. ``auto`` looks at each row, and stops at one that has both a ``text`` and a conversation; a
    ``field`` of another name goes before a conversation."""

    chat_template: str | None = None
    """The template that conversations are written with: a Jinja file, or the name of one of the tokenizer's templates.
    Without it the tokenizer's own. It is kept with the tokenizer."""

    train_on: Literal["assistant", "last", "all"] | None = None
    """Tokens of a conversation that are learned, scored, evaluated and attacked: those of its assistant's turns, those
    of the last one, or all. Default: ``assistant``. Of a ``prompt`` with its ``completion`` the first two are the
    completion's. All tokens of a text are learned."""

    group_field: str | None = None
    """Key or column that says whose a document is, e.g. ``person``: a text or a whole number, empty for nobody's. All
    documents of a group go to one split, so that members and non-members share no person, and ``shares`` hold for
    groups: with few or large ones a split's share of the documents is only about as given. The audit needs it for
    ``audit.group_field``."""

    txt_documents: Literal["file", "paragraph"] = "file"
    """Whether a .txt file is one document, or each of its paragraphs (separated by blank lines) is one."""

    dataset_config: str | None = None
    """Configuration of a ``datasets`` dataset."""

    dataset_split: str = "train"
    """Split of a ``datasets`` dataset to stream."""

    min_characters: Annotated[int, Field(ge=0)] = 0
    """Shorter documents are left out. Unit: characters."""

    max_documents: Count | None = None
    """Read at most so many documents of the source. Unit: documents."""

    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = dataclasses.field(default_factory=default_shares)
    """Share of the documents in each split; together at most 1, the rest is left out. A document's split depends on its
    own text and ``seed`` alone (or its group's name, see ``group_field``). Unit: share, 0 to 1."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split: with the document's own text it decides which split a document is in. Unit: none."""

    near_duplicate_threshold: Annotated[float, Field(gt=0, lt=1)] | None = 0.8
    """Documents whose sets of n-grams have at least this (estimated) Jaccard similarity count as one; null keeps them.
    Unit: similarity, 0 to 1."""

    shingle_words: Count = 5
    """Words per n-gram. A document mostly in scripts that put no spaces between words (Chinese, Japanese, Thai, Khmer,
    ...) has n-grams of characters instead, twice as many; ``prepare`` says how many documents do. Unit: words."""

    special_tokens_in_text: Literal["text", "encode"] = "text"
    """What a document's text becomes where it spells out a special token, e.g. ``<|endoftext|>``: pieces like any other
    text, or (``encode``) the special token itself, for texts that were written with them."""

    permutations: Annotated[int, Field(ge=16)] = 128
    """Hash functions of a MinHash signature: more estimate the similarity of near duplicates more exactly, and take
    longer. Default: datasketch's own. Unit: hash functions."""

    canaries: CanaryConfig | None = None
    """Made-up documents for the audit, added to ``train`` at random; none by default."""

    tokenizer: str | None = None
    """Folder or hub name of a Hugging Face tokenizer, or a SentencePiece ``.model`` file. Without it a byte-level BPE
    is trained on the split ``reference``, so that it has seen no private document."""

    vocab_size: Annotated[int, Field(ge=260)] | None = None
    """Ids of the tokenizer that is trained: 4096 unless given; an error together with ``tokenizer``. Unit: token
    ids."""

    block_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per block, a model's longest input in training. A longer document lies in several blocks, several short
    ones share one. Unit: tokens."""

    lanes: Count = 64
    """Lanes L of each split: sample i comes from lane i mod L, and each shard belongs to one lane. A global micro-batch
    that divides L lets every lane be read by one rank. Unit: lanes."""

    rows_per_shard: Count = 1024
    """Most blocks per shard, the unit that is checked and fetched. Unit: blocks."""

    mix: tuple[MixConfig, ...] = ()
    """Further prepared folders whose split ``train.split`` is mixed into training; ``dir`` gets the share that they
    leave. Evaluations and the audit concern ``dir`` alone."""

    processes: Count = 1
    """Processes that hash, tokenize and pack. The result does not depend on it. Unit: processes."""

    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What training does about a shard (or its reference losses) that is missing or altered: stop with an error that
    names it, or go on with its blocks empty. They are counted as ``data/skipped_blocks``. Scoring and audits always
    stop."""

    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    """Cache, retries and access of prepared data at an address."""

    def __post_init__(self) -> None:
        """Refuse unknown splits and shares above 1."""
        self._check_addresses()
        for name in self.shares:
            if name not in SPLITS:
                raise ValueError(
                    f"data.shares: no split {name!r}{did_you_mean(name, SPLITS)}; splits are {', '.join(SPLITS)}"
                )
        if self.group_field == self.field:
            raise ValueError(f"data.group_field: {self.field!r} is also data.field, which holds the text")
        self._check_chat()
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

    def _check_chat(self) -> None:
        for setting in ("chat_template", "train_on"):
            if self.rows == "text" and getattr(self, setting) is not None:
                raise ValueError(f"data.{setting}: has no effect with data.rows: text; remove it")
        if self.rows == "chat" and self.canaries is not None:
            raise ValueError("data.canaries: are texts, which data.rows: chat leaves no place for; remove them")

    def _check_addresses(self) -> None:
        folders = [self.dir, *(other.dir for other in self.mix)]
        for folder in folders:
            if is_address(folder):
                require_no_secret(folder, "data.dir" if folder == self.dir else "data.mix")
            if "::" in folder:
                raise ValueError("data.dir: addresses joined by '::' are not read; dualtok has a cache of its own")
        if self.stream != StreamConfig() and not any(map(is_address, folders)):
            raise ValueError(
                "data.stream: has no effect on a local folder; remove it (data.stream={}), or give data.dir an address"
            )

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
