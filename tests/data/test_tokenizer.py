"""Tokenizers: SentencePiece models keep their ids, trained ones their texts, folders their fingerprint."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import sentencepiece

from dualtok.data.sources.corpora import sotu_passages
from dualtok.data.tokenizer import END_OF_TEXT, encode, fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

ODD_TEXTS = [
    "naïve café \u2013 “quoted” 漢字 \U0001f600",
    "ﬁne ½ Ⅷ e\u0301",
    "digits 1776, 3.14159 and 10,000",
    "a\nb\n\nc",
    "UPPER lower MiXeD",
    "",
    "x",
    "https://example.org/?q=1&r=%20",
    "   two   spaces   ",
    "tab\there",
]


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return list(itertools.islice(sotu_passages(), 400))


@pytest.fixture(scope="module", params=["unigram", "bpe", "bytes"])
def model_file(request: pytest.FixtureRequest, passages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small SentencePiece model: unigram, BPE, or BPE as Llama's: byte fallback, split digits, identity."""
    prefix = tmp_path_factory.mktemp("spm") / request.param
    like_llama: dict[str, Any] = {
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages[:200]),
        model_prefix=str(prefix),
        vocab_size=1000,
        minloglevel=2,
        model_type="unigram" if request.param == "unigram" else "bpe",
        num_threads=1,
        **(like_llama if request.param == "bytes" else {}),
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def trained(passages: list[str]) -> PreTrainedTokenizerBase:
    return train_tokenizer(passages[:100], 500)


def test_a_sentencepiece_model_keeps_its_ids(model_file: Path, passages: list[str]) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = load_tokenizer(model_file)
    assert len(tokenizer) == own.get_piece_size()
    texts = [*passages[200:], *ODD_TEXTS]
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert ids == [*own.encode(text), own.eos_id()], text[:80]


def test_a_sentencepiece_model_keeps_its_ids_after_saving(
    model_file: Path, passages: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(model_file)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    texts = [*passages[200:250], *ODD_TEXTS]
    assert encode(again, texts) == encode(tokenizer, texts)
    assert fingerprint(again) == fingerprint(tokenizer)
    own = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    # The two spell an unknown piece differently.
    known = [ids for text in passages[200:300] if own.unk_id() not in (ids := own.encode(text))]
    assert len(known) > 10
    for ids in known:
        assert again.decode(ids) == own.decode(ids)


def test_a_trained_tokenizer_round_trips_any_text(trained: PreTrainedTokenizerBase, passages: list[str]) -> None:
    texts = [*passages[300:], *ODD_TEXTS]
    encoded = encode(trained, texts)
    assert len(trained) <= 500
    for text, ids in zip(texts, encoded, strict=True):
        assert ids[-1] == trained.eos_token_id
        assert trained.eos_token_id not in ids[:-1]
        assert trained.decode(ids[:-1]) == text
    # It learned something: fewer tokens than bytes.
    assert sum(map(len, encoded)) < 0.6 * sum(len(text.encode()) for text in texts)


def test_training_is_deterministic(trained: PreTrainedTokenizerBase, passages: list[str]) -> None:
    assert fingerprint(train_tokenizer(iter(passages[:100]), 500)) == fingerprint(trained)


def test_the_fingerprint_follows_the_vocabulary_not_the_folder(
    trained: PreTrainedTokenizerBase, passages: list[str], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        save_tokenizer(trained, tmp_path / name)
    same = {fingerprint(load_tokenizer(tmp_path / name)) for name in ("first", "second")}
    assert same == {fingerprint(trained)}
    encode(trained, ["a text that was encoded meanwhile"])
    others = [train_tokenizer(passages[:100], 499), train_tokenizer(passages[100:200], 500)]
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "first", changed)
    values = json.loads((changed / "tokenizer.json").read_text())
    first, second = values["model"]["merges"][:2]
    values["model"]["merges"][:2] = [second, first]
    (changed / "tokenizer.json").write_text(json.dumps(values))
    others.append(load_tokenizer(changed))
    assert len({fingerprint(tokenizer) for tokenizer in others} | same) == 4


def test_a_beginning_token_is_put_in_front_only_if_the_tokenizer_does_so(
    trained: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    save_tokenizer(trained, tmp_path / "plain")
    plain = load_tokenizer(tmp_path / "plain")
    with_bos = load_tokenizer(tmp_path / "plain")
    with_bos.add_special_tokens({"bos_token": "<|start|>"})
    bos = with_bos.bos_token_id
    (expected,) = encode(plain, ["some text"])
    assert encode(with_bos, ["some text"]) == [expected], "a BOS that the tokenizer itself does not add"

    backend: Any = with_bos
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|endoftext|>", special_tokens=[("<|start|>", bos), (END_OF_TEXT, with_bos.eos_token_id)]
    )
    # Neither is there a second end token where the tokenizer adds one by itself.
    assert encode(with_bos, ["some text", ""]) == [[bos, *expected], [bos, with_bos.eos_token_id]]
    assert fingerprint(with_bos) != fingerprint(plain)


def test_saving_replaces_a_folder_and_leaves_nothing_else(trained: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "stale.txt").write_text("stale")
    (tmp_path / ".tokenizer.tmp").mkdir()
    (tmp_path / ".tokenizer.tmp" / "half.json").write_text("{")
    save_tokenizer(trained, tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert not {"stale.txt", "half.json"} & {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert fingerprint(load_tokenizer(tmp_path / "tokenizer")) == fingerprint(trained)


def test_a_missing_or_garbled_sentencepiece_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.model: no such SentencePiece model \(data\.tokenizer\)"):
        load_tokenizer(tmp_path / "absent.model")
    for name, content in (("garbage", b"not a protobuf" * 50), ("empty", b""), ("zeros", bytes(1000))):
        (tmp_path / f"{name}.model").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.model: not a SentencePiece model"):
            load_tokenizer(tmp_path / f"{name}.model")


def test_a_folder_without_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=rf"{tmp_path}: not a tokenizer that can be read.*data\.tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=rf"{tmp_path}: not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_end_token_is_refused(trained: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "tokenizer" / name
        if path.is_file():
            values = json.loads(path.read_text())
            values.pop("eos_token", None)
            path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"no end-of-sequence token"):
        load_tokenizer(tmp_path / "tokenizer")


SPELLED = [
    "struck </s> out",
    "<s>",
    "a<unk>b",
    "byte <0x0A> and <0x41>",
    "<ctl> here",
    "price <sep> <sep>x",
    "</s></s>",
]
WHITE = ["final newline\n", "a\r\nb\r\n\r\nc", "a\rb", "  a   b  ", "a \n\n b", "\n", " ", "a\u00a0b\u3000c", "\tx\t"]
IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity"}
KEPT: dict[str, Any] = {"remove_extra_whitespaces": False}
OWN_IDS: dict[str, dict[str, Any]] = {
    "unigram": {},
    "unigram, bytes": {"byte_fallback": True},
    "bpe": {"model_type": "bpe"},
    "identity": IDENTITY,
    "identity, bpe": {"model_type": "bpe", **IDENTITY},
    "white space kept": KEPT,
    "white space kept, bpe, bytes": {"model_type": "bpe", "byte_fallback": True, **KEPT},
    "identity, white space kept": {"model_type": "bpe", **IDENTITY, **KEPT},
    "control symbols": {"control_symbols": ["<ctl>", "<|turn|>"]},
    "symbols without a space in front": {
        "model_type": "bpe",
        "user_defined_symbols": ["<sep>", "\n"],
        "add_dummy_prefix": False,
        **IDENTITY,
        **KEPT,
    },
    "no space in front": {"add_dummy_prefix": False},
    "digits": {"split_digits": True, "model_type": "bpe"},
}
"""Kinds of models that tokenizers can follow."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "symbols": ({"model_type": "bpe", "user_defined_symbols": ["<sep>"]}, "it has user-defined symbols; "),
    "symbols, unigram": ({"user_defined_symbols": ["<sep>", "<x>"]}, "it has user-defined symbols; "),
    "suffix": ({"treat_whitespace_as_suffix": True}, "it writes white space at the end of words"),
}


def trained_model(folder: Path, passages: list[str], **settings: Any) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages[:200]),
        model_prefix=str(folder / "odd"),
        vocab_size=1000,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return folder / "odd.model"


@pytest.mark.parametrize("kind", OWN_IDS)
def test_a_sentencepiece_model_of_any_kind_gives_its_own_ids(kind: str, passages: list[str], tmp_path: Path) -> None:
    file = trained_model(tmp_path, passages, **OWN_IDS[kind])
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    save_tokenizer(load_tokenizer(file), tmp_path / "saved")
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    texts = [*passages[200:260], *ODD_TEXTS, *SPELLED, *WHITE]
    for tokenizer in (load_tokenizer(file), load_tokenizer(tmp_path / "saved"), load_tokenizer(tmp_path)):
        for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
            assert ids == [*own.encode(text), own.eos_id()], text[:80]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_followed_is_refused_with_the_reason(
    kind: str, passages: list[str], tmp_path: Path
) -> None:
    settings, reason = REFUSED[kind]
    file = trained_model(tmp_path, passages, **settings)
    with pytest.raises(DataError) as caught:
        load_tokenizer(file)
    assert f"tokenizers cannot give the ids of sentencepiece itself: {reason}" in str(caught.value)
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="cannot give the ids of sentencepiece itself"):
        load_tokenizer(tmp_path)


def test_tokens_that_a_folder_adds_to_its_model_keep_their_ids(passages: list[str], tmp_path: Path) -> None:
    file = trained_model(tmp_path, passages)
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}", "add_bos_token": True})
    )
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 1000, "<pad>": 1001}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 1000)
    assert tokenizer.convert_tokens_to_ids("<pad>") == 1001
    assert tokenizer.chat_template == "{{ messages }}"
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 1005, "<|end|>": 1000}')
    with pytest.raises(DataError, match=r"added_tokens\.json: '<pad>' is 1005, but would be 1001"):
        load_tokenizer(tmp_path)
