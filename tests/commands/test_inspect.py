"""``dualtok inspect``: documents with their trained tokens, blocks with their documents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.commands.inspect import CUT, GREEN, PLAIN, printable
from dualtok.data.folder import DataFolder
from dualtok.data.tokenizer import load_tokenizer
from tests.chat_support import chat_rows, write_chat_corpus
from tests.support import dualtok, error_line, succeed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Blocks that hold each conversation whole.
    return write_chat_corpus(tmp_path_factory.mktemp("inspect"), rows=60, block_length=512)


def test_answers_stand_out(corpus: dict[str, Any]) -> None:
    shown = succeed(dualtok("inspect", corpus["dir"], "--samples", 2, "--blocks", 0))
    data = DataFolder(corpus["dir"])
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    for doc in data.documents("train")["doc"].to_pylist()[:2]:
        messages = chat_rows(60)[doc]["messages"]
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
        for message in messages:
            if message["role"] == "assistant":
                answer = message["content"] + "<|im_end|>"
                expected = expected.replace(answer, f"⟦{answer}⟧")
        assert expected in shown
    entry = data.entry("train")
    assert f"{entry.predicted_tokens:,} tokens have a loss" in shown
    assert "data.train_on: assistant" in shown
    assert shown.count("\ndocument ") == 2
    colored = succeed(dualtok("inspect", corpus["dir"], "--samples", 2, "--blocks", 0, "--color"))
    assert colored.replace(GREEN, "⟦").replace(PLAIN, "⟧") == shown


def test_blocks_list_their_documents(corpus: dict[str, Any]) -> None:
    shown = succeed(dualtok("inspect", corpus["dir"], "--split", "held_out", "--samples", 0, "--blocks", 10**6))
    data = DataFolder(corpus["dir"])
    table = data.documents("held_out")
    found = re.findall(r"document (\d+), from its token 0, ([\d,]+) have a loss", shown)
    learned = dict(zip(table["doc"].to_pylist(), table["n_trained"].to_pylist(), strict=True))
    assert {int(doc): int(count.replace(",", "")) for doc, count in found} == learned
    assert shown.count(" padding\n") == data.entry("held_out").blocks
    few = succeed(dualtok("inspect", corpus["dir"], "--samples", 0, "--blocks", 2))
    assert few.count(" padding\n") == 2


def test_texts_are_shown_whole_and_cut_where_blocks_end(small_corpus: dict[str, Any]) -> None:
    shown = succeed(dualtok("inspect", small_corpus["dir"], "--samples", 1, "--blocks", 0))
    (cut,) = re.findall(r"in (\d+) pieces", shown)
    assert shown.count(CUT) == int(cut) - 1 > 0
    assert shown.count("⟦") == int(cut)


def test_a_text_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\n\tc\u202e") == "a\\x1b[31mb\\r\n\tc\\u202e"


def test_what_is_not_there_is_an_error(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    assert "run `dualtok prepare`" in error_line(dualtok("inspect", tmp_path))
    assert "prepared without split 'tain'" in error_line(dualtok("inspect", small_corpus["dir"], "--split", "tain"))
