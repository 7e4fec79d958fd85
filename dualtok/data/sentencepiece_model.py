"""SentencePiece models as fast tokenizers that give the very ids of ``sentencepiece`` itself, or none at all.

The two libraries differ in what they do with symbols that a user has defined, pieces that are no text (control and byte
pieces), and white space. Each model is therefore tried on texts of these kinds, made of its own pieces, and refused
with the reason where the ids differ.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

# Imported where they are used, for what they take to load: transformers (1 to 4 s).
# Imported where they are used, for they need not be installed or wanted: sentencepiece.

END_OF_TEXT = "<|endoftext|>"
MODEL_FILES = ("tokenizer.model", "spiece.model")
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Types of pieces that are no plain text (sentencepiece_model.proto)."""
NO_TEXT = (UNKNOWN, CONTROL, UNUSED, BYTE)
"""Pieces that are never found in text, however it is spelled."""
UNIGRAM = 1
"""TrainerSpec.ModelType; its tokenizers take every piece for text, where those of BPE merge characters alone."""
BYTE_PIECE = "0x[0-9A-F]{2}>"
TRIED_SYMBOLS = 16
"""User-defined symbols of a model that it is tried on."""
TEXTS = (
    "Plain words, 3.14 and 007: Zürich naïve ŁÓDŹ «Пример» 東京と서울 ภาษาไทย 🙂 e\u0301 ﬁ ①",
    "don't WON'T x+y=z\tand\ttabs __init__ ▁ ﷺ \u200b",
)


def load_sentencepiece(path: Path, settings: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Return a SentencePiece model as a fast tokenizer.

    Args:
        path: the ``.model`` file.
        settings: special tokens and chat template, by the names that transformers gives them.

    Raises:
        DataError: there is no such file, it is no such model, or its ids would not be those of ``sentencepiece``.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

    if not path.is_file():
        raise DataError(f"{path}: no such SentencePiece model (data.tokenizer)")
    try:
        extractor = SentencePieceExtractor(str(path))
        proto = extractor.proto
        if proto.trainer_spec.treat_whitespace_as_suffix:
            raise DataError(_refusal(path, "it writes white space at the end of words (treat_whitespace_as_suffix)"))
        parts: Any = extractor.extract(None)  # the library's annotation is another method's
        backend = SpmConverter.build_tokenizer_from_spm_proto(proto, parts["vocab"], parts.get("merges"))
        if backend is None:
            raise ValueError("it is neither a unigram nor a BPE model, or empty")
    except DataError:
        raise
    except Exception as error:  # protobuf and the converter raise unrelated classes for a malformed file
        raise DataError(f"{path}: not a SentencePiece model: {' '.join(str(error).split())[:120]}") from None
    trainer = proto.trainer_spec
    if proto.normalizer_spec.add_dummy_prefix:
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    special = {"unk_token": trainer.unk_piece, "eos_token": trainer.eos_piece if trainer.eos_id >= 0 else END_OF_TEXT}
    if trainer.bos_id >= 0:
        special["bos_token"] = trainer.bos_piece
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    backend.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in symbols])
    no_text = [piece.piece for piece in proto.pieces if piece.type in NO_TEXT] if trainer.model_type == UNIGRAM else []
    model, why = SentencePieceProcessor(model_file=str(path)), ""
    for returns_as_feeds in (False, True):
        _set_steps(backend, proto.normalizer_spec, no_text, symbols=bool(symbols), returns_as_feeds=returns_as_feeds)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(special | (settings or {})))
        found = _first_difference(model, tokenizer, symbols)
        if found is None:
            return tokenizer
        why = why or found
    raise DataError(_refusal(path, why))


def sentencepiece_in(folder: Path) -> Path | None:
    """Return the SentencePiece model that a folder's tokenizer is made of; None if it has another tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return None
    return next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)


def load_from_folder(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder that holds a SentencePiece model: the file's ids, and the folder's settings.

    Raises:
        DataError: as :func:`load_sentencepiece`; or a token was added under an id that is taken.
    """
    folder = path.parent
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in _json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str) and (key.endswith("_token") or key == "chat_template"):
                settings[key] = content
    tokenizer = load_sentencepiece(path, settings)
    for token, index in sorted(_json(folder / "added_tokens.json").items(), key=lambda item: item[1]):
        tokenizer.add_tokens([token])
        if (given := tokenizer.convert_tokens_to_ids(token)) != index:
            raise DataError(
                f"{folder}/added_tokens.json: {token!r} is {index}, but would be {given}; save the tokenizer as a fast "
                "one (tokenizer.json)"
            )
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:120]}") from None
    return values


def _first_difference(
    model: SentencePieceProcessor, tokenizer: PreTrainedTokenizerBase, symbols: list[str]
) -> str | None:
    """Return on what text the ids differ, and what that text is about; None if they are the same on all."""
    for kind, text in _tried(model, symbols):
        ids = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        if ids != model.encode(text):
            return f"{kind}; {text!r} would have other ids"
    return None


def _tried(model: SentencePieceProcessor, symbols: list[str]) -> Iterator[tuple[str, str]]:
    """Yield texts on which the two libraries may differ, each with what it is about."""
    for symbol in symbols[:TRIED_SYMBOLS]:
        for text in (f"a {symbol} b", f"a{symbol}b", f"{symbol} b", f"{symbol}{symbol} "):
            yield "it has user-defined symbols", text
    controls = [
        model.id_to_piece(i)
        for i in range(model.get_piece_size())
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
    ]
    for piece in controls[:TRIED_SYMBOLS]:
        yield "a control piece that is spelled out is taken for the piece itself", f"a {piece} b{piece}"
    yield "a byte piece that is spelled out is taken for the byte", "a <0x0A> b<0x41>"
    for text in ("a\nb", "a b\n", "a\n\n  b \n\n"):
        yield "line ends are treated otherwise", text
    yield "carriage returns are treated otherwise", "a\r\nb\r\n\r\nc\rd"
    for text in (" a  b   c ", "a\u00a0b\u3000c"):
        yield "white space is treated otherwise", text
    for text in TEXTS:
        yield "text is normalized otherwise", text


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path}: tokenizers cannot give the ids of sentencepiece itself: {why}. Give the model's own fast tokenizer "
        "(a folder with tokenizer.json), if it has one"
    )


def _set_steps(backend: Any, settings: Any, no_text: list[str], *, symbols: bool, returns_as_feeds: bool) -> None:
    """Give a tokenizer the steps before its model.

    Args:
        backend: the tokenizer.
        settings: the model's normalizer.
        no_text: pieces that must not be found in text; each is cut in two.
        symbols: whether there are user-defined symbols. They are looked for in normalized text, where a space in front
            of the text is then put too late to be taken for theirs.
        returns_as_feeds: whether a carriage return before a line feed counts as another one: some normalizers make a
            space of each, and tokenizers one of both.
    """
    steps: list[normalizers.Normalizer] = []
    if returns_as_feeds:
        steps.append(normalizers.Replace("\r\n", "\n\n"))
    if settings.precompiled_charsmap:
        steps.append(normalizers.Precompiled(settings.precompiled_charsmap))
    if settings.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), by) for pattern, by in ((" {2,}", " "), (r"\A +| +\z", ""))]
    before: list[Any] = []
    if symbols:
        scheme = "first" if settings.add_dummy_prefix else "never"
        before.append(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    else:
        if settings.add_dummy_prefix:
            steps.append(normalizers.Prepend("▁"))
        steps.append(normalizers.Replace(" ", "▁"))
    cuts = sorted({_cut_of(piece) for piece in no_text if len(piece) > 1})
    if cuts:
        before.append(pre_tokenizers.Split(Regex("|".join(cuts)), "isolated"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence(before) if before else None


def _cut_of(piece: str) -> str:
    """Return a pattern of a place within a piece: before its first letter or digit, so that signs stay together, which
    are often unknown and then one."""
    if re.fullmatch(f"<{BYTE_PIECE}", piece):
        return f"(?<=<)(?={BYTE_PIECE})"
    position = next((position for position in range(1, len(piece)) if piece[position].isalnum()), 1)
    return f"(?<={re.escape(piece[:position])})(?={re.escape(piece[position:])})"
