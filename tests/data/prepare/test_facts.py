"""What ``prepare`` says of texts: special tokens spelled out, losses, shared passages, files left out."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.data import DataConfig
from dualtok.data.folder import DataFolder
from dualtok.data.prepare.pipeline import prepare, summary
from dualtok.data.sources.corpora import write_jsonl
from dualtok.data.stream.documents import document_pieces
from dualtok.data.tokenizer import END_OF_TEXT, encode, load_tokenizer, save_tokenizer, train_tokenizer
from dualtok.data.tokenizer_check import CHANGED, UNKNOWN, VANISHED, WHITE_SPACE, SpelledOut, lost
from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.data.manifest import Manifest

SHARES = {"train": 0.6, "reference": 0.2, "held_out": 0.2}


def passages_of(draw: random.Random, count: int, words: int = 60) -> list[str]:
    known = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "sel") for b in ("ran", "dol", "fin", "gat", "pum", "x", "y")]
    return [" ".join(draw.choices(known, k=words)) for _ in range(count)]


def prepared(folder: Path, texts: list[str], **changes: Any) -> Manifest:
    settings = {"block_length": 64, "lanes": 2, "vocab_size": 400, "shares": SHARES, **changes}
    source = write_jsonl(texts, folder / "texts.jsonl")
    return prepare(DataConfig(dir=str(folder / "data"), source=str(source), **settings), progress=False)


def ends_within(folder: Path) -> int:
    """Return in how many documents the end token stands before the end."""
    data = DataFolder(folder / "data")
    end, found = data.tokenizer.eos_token_id, 0
    for split, entry in data.manifest.splits.items():
        documents = document_pieces(data.open(split), data.documents(split)["doc"].to_numpy(), max(1, entry.blocks))
        found += sum(end in [i for piece in pieces for i in piece.ids][:-1] for pieces in documents.values())
    return found


@pytest.fixture(scope="module")
def spelled() -> list[str]:
    draw = random.Random(1)
    odd = [f"{a} {END_OF_TEXT} {b}" for a, b in zip(*[iter(passages_of(draw, 40, 30))] * 2, strict=True)]
    return [*passages_of(draw, 80), *odd]


def test_a_special_token_that_is_spelled_out_is_text(tmp_path: Path, spelled: list[str]) -> None:
    manifest = prepared(tmp_path, spelled)
    assert manifest.facts is not None
    assert manifest.facts.with_special_tokens == 20
    assert ends_within(tmp_path) == 0
    assert "20 documents spell out a special token, which became ordinary pieces" in summary(manifest)


def test_it_is_encoded_where_that_is_asked_for(tmp_path: Path, spelled: list[str]) -> None:
    manifest = prepared(tmp_path, spelled, special_tokens_in_text="encode")
    assert ends_within(tmp_path) == 20
    assert "20 documents spell out a special token, which became these tokens" in summary(manifest)
    with pytest.raises(ConfigError, match=r"data\.special_tokens_in_text: 'text', but .* was prepared with 'encode'"):
        prepared(tmp_path, spelled)


@pytest.mark.parametrize("token", ["<|im_start|>", "[INST]", "</s>", "⟨sep⟩"])
def test_every_special_token_counts_and_no_other(tmp_path: Path, token: str) -> None:
    tokenizer = train_tokenizer(["some words"] * 9, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.add_tokens(["plain_added"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    texts = [f"a {token} b", f"{token}{token}", f"a {token[:-1]} b", "plain_added", END_OF_TEXT, ""]
    assert SpelledOut(again).count(texts) == 3
    special = {again.convert_tokens_to_ids(token), again.eos_token_id}
    for ids in encode(again, texts):
        assert special.isdisjoint(ids[:-1])
    assert [bool(special & set(ids[:-1])) for ids in encode(again, texts, special=True)] == [1, 1, 0, 0, 1, 0]


def test_a_folder_of_before_this_setting_is_taken_as_it_is(tmp_path: Path, spelled: list[str]) -> None:
    import json

    prepared(tmp_path, spelled)
    echo = tmp_path / "data" / "prepare.json"
    settings = json.loads(echo.read_text())
    del settings["special_tokens_in_text"]
    echo.write_text(json.dumps(settings))
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*.arrow")}
    assert written
    prepared(tmp_path, spelled)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*.arrow")} == written


def tokenizer_with(normalizer: Any, pre_tokenizer: Any, texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


def test_what_a_tokenizer_loses_is_told_by_its_kind() -> None:
    from tokenizers import normalizers, pre_tokenizers

    whole = train_tokenizer(["some words"] * 9, 300)
    texts = ["plain words", "two\n\n  lines", "naïve 漢字 \U0001f600", ""]
    assert lost(whole, texts) == {}
    words = tokenizer_with(normalizers.Sequence([]), pre_tokenizers.WhitespaceSplit(), ["plain words two lines"] * 9)
    assert lost(words, ["qqq"]) == {UNKNOWN: 1}
    assert lost(words, ["plain\n\nwords"]) in ({WHITE_SPACE: 1}, {CHANGED: 1})
    no_digits = tokenizer_with(normalizers.Replace("7", ""), pre_tokenizers.WhitespaceSplit(), ["plain"] * 9)
    assert lost(no_digits, ["plain7"])[VANISHED] == 1
    lower = tokenizer_with(normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit(), ["plain"] * 9)
    assert lost(lower, ["PLAIN"]) == {CHANGED: 1}


def test_a_lossy_tokenizer_is_warned_about(tmp_path: Path) -> None:
    from tokenizers import normalizers, pre_tokenizers

    texts = passages_of(random.Random(2), 60)
    lossy = tokenizer_with(normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit(), texts)
    save_tokenizer(lossy, tmp_path / "lossy")
    odd = [text.replace("ba", "BA") for text in texts]
    told = summary(prepared(tmp_path, odd, tokenizer=str(tmp_path / "lossy"), vocab_size=None))
    assert "warning: " in told
    assert "sampled documents do not come back from tokens: " in told
    (tmp_path / "whole").mkdir()
    assert "come back from tokens" not in summary(prepared(tmp_path / "whole", odd))


def test_passages_that_both_sides_share_are_warned_about(tmp_path: Path) -> None:
    draw = random.Random(3)
    (boilerplate,) = passages_of(draw, 1, 80)
    texts = [f"{text} {boilerplate}" for text in passages_of(draw, 120, 200)]
    manifest = prepared(tmp_path, texts, block_length=2048)
    assert manifest.facts is not None
    assert manifest.facts.shared_passages is not None
    assert manifest.facts.shared_passages > 0.95
    told = summary(manifest)
    assert "of held_out share a passage of 200 characters with train" in told
    assert "lower data.near_duplicate_threshold (now 0.8)" in told
    (tmp_path / "apart").mkdir()
    apart = prepared(tmp_path / "apart", passages_of(draw, 120, 200), block_length=2048)
    assert apart.facts is not None
    assert apart.facts.shared_passages == 0.0
    assert "share a passage" not in summary(apart)


def test_files_left_out_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(passages_of(random.Random(4), 60), source / "a.jsonl")
    for number in range(12):
        (source / f"notes-{number:02d}.md").write_text("not a document")
    settings = DataConfig(
        dir=str(tmp_path / "data"), source=str(source), shares=SHARES, block_length=64, lanes=2, vocab_size=400
    )
    from dualtok.data.sources.documents import left_out

    manifest = prepare(settings, progress=False)
    assert manifest.facts is not None
    assert manifest.facts.left_out_files == 12
    told = summary(manifest, left_out(settings)).splitlines()
    assert told[-12] == "  12 files of the source were not read:"
    assert told[-11].endswith("notes-00.md: cannot read .md")
    assert told[-1] == "    and 2 more"
