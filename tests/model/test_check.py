"""A model runs on prepared blocks only if its tokenizer is the blocks' and knows every id in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.data.folder import DataFolder
from dualtok.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_size
from dualtok.errors import ConfigError
from dualtok.model.check import check_fits, check_model, check_same_tokenizer
from dualtok.model.load import read_model_config
from tests.support import VOCABULARY, save_model

if TYPE_CHECKING:
    from collections.abc import Callable

Json = dict[str, Any]


@pytest.fixture
def data(small_corpus: Json) -> DataFolder:
    return DataFolder(small_corpus["dir"])


def edited(data: DataFolder, folder: Path, change: Callable[[Json], object]) -> Path:
    """Save the blocks' tokenizer with another tokenizer.json."""
    save_tokenizer(data.tokenizer, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_its_own_tokenizer_and_none_at_all_pass(data: DataFolder, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=0)
    assert check_model(model, data, origin="x").vocab_size == VOCABULARY
    save_tokenizer(data.tokenizer, tmp_path / "with")
    shutil.copytree(model, tmp_path / "with", dirs_exist_ok=True)
    check_model(tmp_path / "with", data, origin="x")


def swap(content: Json) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def lower(content: Json) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def digits(content: Json) -> None:
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]],
    }


def fewer_merges(content: Json) -> None:
    content["model"]["merges"] = content["model"]["merges"][:20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            swap,
            r"x: its tokenizer has another vocabulary than the blocks': .* is 30[01] there and 30[01] in the blocks",
        ),
        (lower, r"x: its tokenizer cuts text otherwise than the blocks': .The Quick"),
        (fewer_merges, r"x: its tokenizer cuts text otherwise than the blocks'"),
    ],
)
def test_a_tokenizer_that_gives_other_ids_is_refused(
    data: DataFolder, tmp_path: Path, change: Callable[[Json], object], message: str
) -> None:
    folder = edited(data, tmp_path / "other", change)
    with pytest.raises(ConfigError, match=message + r".*prepare the data with its tokenizer \(data\.tokenizer\)"):
        check_same_tokenizer(folder, data, origin="x")


def test_a_tokenizer_trained_on_other_texts_is_refused(data: DataFolder, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["other words entirely"] * 20, VOCABULARY), tmp_path / "other")
    with pytest.raises(ConfigError, match="has another vocabulary than the blocks'"):
        check_same_tokenizer(tmp_path / "other", data, origin="x")


def test_tokens_that_no_block_holds_may_be_more_on_either_side(data: DataFolder, tmp_path: Path) -> None:
    own = load_tokenizer(Path(str(data.location)) / "tokenizer")
    own.add_tokens([f"<reserved_{number}>" for number in range(25)])
    save_tokenizer(own, tmp_path / "larger")
    check_same_tokenizer(tmp_path / "larger", data, origin="x")


def larger(small_corpus: Json, folder: Path, *, old: bool) -> DataFolder:
    """Return the same blocks with a tokenizer that has 25 ids more."""
    shutil.copytree(small_corpus["dir"], folder, ignore=shutil.ignore_patterns("scores"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.add_tokens([f"<reserved_{number}>" for number in range(25)])
    shutil.rmtree(folder / "tokenizer")
    save_tokenizer(tokenizer, folder / "tokenizer")
    if old:
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["splits"].values():
            del entry["largest_id"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return DataFolder(folder)


@pytest.mark.parametrize("old", [False, True])
def test_a_tokenizer_larger_than_the_model_is_fine_while_no_block_holds_such_an_id(
    small_corpus: Json, tmp_path: Path, old: bool
) -> None:
    """Also in a folder that an earlier version prepared, which does not tell its largest id."""
    data = larger(small_corpus, tmp_path / "data", old=old)
    assert vocabulary_size(data.tokenizer) == VOCABULARY + 25
    assert data.largest_id < VOCABULARY
    check_model(save_model(tmp_path / "model", seed=0), data, origin="x")
    small = save_model(tmp_path / "small", seed=0, vocab_size=data.largest_id)
    with pytest.raises(ConfigError) as caught:
        check_fits(read_model_config(small), data, origin="x")
    held = data.holds(data.largest_id)
    assert held is not None
    assert f"x: vocab_size is {data.largest_id}, but document {held.document} of the split" in str(caught.value)
    assert f"holds the id {data.largest_id} (" in str(caught.value)


def test_ids_with_holes_count_by_the_largest(data: DataFolder, tmp_path: Path) -> None:
    def make_holes(content: Json) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: i if i < 400 else i + 40 for token, i in vocabulary.items()}

    holes = load_tokenizer(edited(data, tmp_path / "holes", make_holes))
    assert len(holes) < vocabulary_size(holes) == VOCABULARY + 40


def test_blocks_longer_than_the_positions_are_refused(data: DataFolder, tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", seed=0, max_position_embeddings=63)
    with pytest.raises(ConfigError, match=r"x: max_position_embeddings is 63, but data.block_length is 64"):
        check_fits(read_model_config(short), data, origin="x")
