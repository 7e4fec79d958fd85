"""Whether a model can be run on prepared blocks: weights, positions, ids and tokenizer, before any weight is read.

A model that reads the blocks with another tokenizer's eyes takes every text for noise: its losses say nothing about
what it has seen, and an audit of it would find nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtok.data.tokenizer import read_tokenizer, vocabulary_size
from dualtok.errors import ConfigError, DataError
from dualtok.model.empty import empty_causal_lm
from dualtok.model.folder.weights import WeightFiles, model_folder
from dualtok.model.load import read_model_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from dualtok.data.folder import DataFolder

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
SAMPLE = (
    "The Quick brown fox's 1,024 words, 3.14 and 007.  Two  spaces\tand a tab;\n\na new paragraph: don't, WON'T.",
    "Zürich, naïve café, ŁÓDŹ; «Пример»; 東京と서울, ภาษาไทย; a\u0301 ﬁ ①",
    "def f(x):\n    return x[0] != '_' and 2 ** 10  # 100%",
)
"""Texts that two tokenizers of one vocabulary cut differently if they normalize or split differently."""


def check_model(
    path: str | Path,
    data: DataFolder,
    *,
    origin: str,
    attention: str | None = None,
    trust_remote_code: bool = False,
    setting: str = "model.trust_remote_code",
) -> PretrainedConfig:
    """Return a model's configuration after comparing its folder with itself and with prepared blocks.

    Args:
        path: folder or hub name.
        data: the blocks that it is to read.
        origin: names the model in errors.
        attention: attention implementation that it will use; None takes the architecture's own.
        trust_remote_code: run Python code that it brings.
        setting: what allows that, for the error.

    Raises:
        ConfigError: the folder does not hold the model of its ``config.json``, or that model cannot take the blocks.
    """
    folder = model_folder(path)
    config = read_model_config(folder, trust_remote_code=trust_remote_code, setting=setting)
    check_fits(config, data, origin=origin)
    check_same_tokenizer(folder, data, origin=origin)
    WeightFiles(folder, empty_causal_lm(config, attention, origin=f"{folder}/config.json"))
    return config


def check_fits(config: PretrainedConfig, data: DataFolder, *, origin: str) -> None:
    """Refuse a model that has too few ids or positions for the prepared blocks.

    A tokenizer with more ids than the model is fine as long as no block holds one of them.

    Raises:
        ConfigError: names an id and a document that holds it, or the two lengths.
    """
    text = config.get_text_config()
    if (held := data.holds(text.vocab_size)) is not None:
        raise ConfigError(
            f"{origin}: vocab_size is {text.vocab_size}, but document {held.document} of the split {held.split!r} "
            f"holds the id {held.id} ({data.tokenizer.convert_ids_to_tokens(held.id)!r}); raise vocab_size or prepare "
            "the data with the model's own tokenizer (data.tokenizer)"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < data.manifest.block_length:
        raise ConfigError(
            f"{origin}: max_position_embeddings is {positions}, but data.block_length is {data.manifest.block_length}; "
            "raise the former or prepare shorter blocks"
        )


def check_same_tokenizer(folder: Path, data: DataFolder, *, origin: str) -> None:
    """Refuse a model whose own tokenizer gives other ids than the one that made the blocks.

    A folder without a tokenizer passes: the sizes alone can be compared then (:func:`check_fits`). Tokens that no block
    holds may differ.

    Raises:
        ConfigError: names a token that the two number differently, or a word that they cut differently.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return
    advice = "prepare the data with its tokenizer (data.tokenizer), or choose another model"
    try:
        theirs = read_tokenizer(folder)
    except DataError as error:
        raise ConfigError(f"{origin}: {error}; or remove it from the folder if the blocks were made with it") from None
    known, limit = theirs.get_vocab(), vocabulary_size(theirs)
    for token, index in sorted(data.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != index and (index < limit or index <= data.largest_id):
            raise ConfigError(
                f"{origin}: its tokenizer has another vocabulary than the blocks': {token!r} is {known.get(token)} "
                f"there and {index} in the blocks; {advice}"
            )
    for text in SAMPLE:
        ours, own = (_cut(tokenizer, text) for tokenizer in (data.tokenizer, theirs))
        if ours != own:
            position = next(i for i in range(len(ours) + 1) if ours[: i + 1] != own[: i + 1])
            there, here = (
                tokenizer.convert_ids_to_tokens(ids[position : position + 3])
                for tokenizer, ids in ((theirs, own), (data.tokenizer, ours))
            )
            raise ConfigError(
                f"{origin}: its tokenizer cuts text otherwise than the blocks': {text!r} goes on with {there} there "
                f"and with {here} in the blocks after {position} tokens; {advice}"
            )


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
