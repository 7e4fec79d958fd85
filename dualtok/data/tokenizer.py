"""Tokenizers: any Hugging Face one, a SentencePiece model, or a byte-level BPE trained on the reference split.

Documents are encoded without special tokens, a beginning-of-sequence token is put in front if the tokenizer puts one
there by itself, and the end token closes every document.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dualtok.data.remote.remote import location_of
from dualtok.data.sentencepiece_model import END_OF_TEXT, load_from_folder, load_sentencepiece, sentencepiece_in
from dualtok.errors import DataError
from dualtok.files import atomic_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from dualtok.data.manifest import Manifest
    from dualtok.data.remote.remote import Location, RemoteFolder

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

FOLDER = "tokenizer"
FETCHING, STALE_SECONDS = ".fetching-", 86_400
KNOWN_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
"""What a tokenizer's folder may hold, for web servers, which cannot be asked for names."""


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a hub name or a SentencePiece ``.model`` file, to prepare data with it.

    Raises:
        DataError: it cannot be read, or has no end-of-sequence token.
    """
    tokenizer = read_tokenizer(source)
    if tokenizer.eos_token_id is None:
        raise DataError(f"{source}: the tokenizer has no end-of-sequence token, which must close every document")
    return tokenizer


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that need not end documents, e.g. to compare it with another.

    Raises:
        DataError: it cannot be read.
    """
    from transformers import AutoTokenizer

    path = Path(source)
    if path.suffix == ".model":
        return load_sentencepiece(path)
    if path.is_dir() and (model := sentencepiece_in(path)) is not None:
        return load_from_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the library raises a dozen unrelated classes for "cannot be had"
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{source}: the tokenizer brings Python code of its own (auto_map), which dualtok never runs; save it "
                "as a fast tokenizer (tokenizer.json) and give that folder (data.tokenizer)"
            ) from None
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{source}: not a tokenizer that can be read: {reason} (data.tokenizer)") from None
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a tokenizer's largest id and one, the rows that an embedding needs; ``len`` counts no holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def load_data_tokenizer(data_dir: str | Location, manifest: Manifest) -> PreTrainedTokenizerBase:
    """Load the tokenizer that data was prepared with; from an address by way of the host's cache.

    Raises:
        DataError: it cannot be read, or is not the manifest's.
    """
    location = location_of(data_dir)
    if isinstance(location, Path):
        return load_tokenizer(location / FOLDER)
    tokenizer = load_tokenizer(_fetched_tokenizer(location, manifest.tokenizer_fingerprint))
    if fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise DataError(f"{location}/{FOLDER}: not the tokenizer that the manifest names; upload the folder again")
    return tokenizer


def _fetched_tokenizer(location: RemoteFolder, its_fingerprint: str) -> Path:
    """Return a local copy of an address's tokenizer; whole or absent, whoever fetches it at the same time."""
    key = hashlib.sha256(f"{location}\n{its_fingerprint}".encode()).hexdigest()
    folder = location.cache_root / "tokenizers" / key
    if folder.is_dir():
        return folder
    storage = location.storage
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{FETCHING}*"):  # by a process that was killed
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=folder.parent, prefix=FETCHING, ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary) / "tokenizer"
        copy.mkdir()
        for name in KNOWN_FILES if storage.is_web_server else storage.names(FOLDER):
            with suppress(FileNotFoundError):
                (copy / name).write_bytes(storage.read(f"{FOLDER}/{name}", patient=not storage.is_web_server))
        if not any(copy.iterdir()):
            raise DataError(f"{location}/{FOLDER}: no tokenizer there; upload the whole prepared folder")
        with suppress(OSError):  # another process was there first
            copy.rename(folder)
    return folder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` ids on texts."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = False, end: bool = True
) -> list[list[int]]:
    """Return the token ids of documents.

    Args:
        tokenizer: with an end token.
        texts: the documents.
        special: whether special tokens that a text spells out become these tokens, and not pieces like other text.
        end: whether the end token closes each document.
    """
    head = beginning(tokenizer)
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False, split_special_tokens=not special
    )["input_ids"]
    tail = [tokenizer.eos_token_id] if end else []
    return [[*head, *ids, *tail] for ids in encoded]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token's id if the tokenizer puts one in front by itself, else nothing."""
    # An empty text shows which special tokens the tokenizer adds by itself; only a leading BOS is wanted.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if adds_bos else []


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides the ids: vocabulary, merges, normalization, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = repr((tokenizer.bos_token_id, tokenizer.eos_token_id))
    return hashlib.sha256(f"{content}\n{special}".encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer as a Hugging Face folder that is whole or absent."""
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
