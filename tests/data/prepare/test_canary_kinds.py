"""Canaries without a drawn secret: sampled text that is sampled once, and tokens that are rare in the source."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.canaries import CanaryConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare import pipeline, staged
from dualtok.data.prepare.canaries import draw_canaries, load_canaries
from dualtok.data.prepare.parts import Part
from dualtok.data.prepare.pipeline import finish, prepare, prepare_part, summary
from dualtok.data.sources.corpora import write_jsonl
from dualtok.data.tokenizer import encode, load_tokenizer
from dualtok.errors import DataError
from tests.data.prepare.preparing import CHUNK, contents, section_of, settings_of

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.data import DataConfig

SAMPLED = {"kind": "high_temperature", "model": "some/model"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(texts[: 4 * CHUNK], tmp_path_factory.mktemp("source") / "texts.jsonl")


def settings(folder: Path, source: Path, prepared: Path, **canaries: Any) -> DataConfig:
    made = CanaryConfig(**{"count": 30, "seed": 5, **canaries})
    tokenizer = {"tokenizer": str(prepared / "tokenizer"), "vocab_size": None}
    return settings_of(folder, source, canaries=made, **tokenizer)


class Sampler:
    """Texts that differ at every call, as those of another machine may."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, config: CanaryConfig) -> list[str]:
        self.calls += 1
        return [f"Sampled {number} in call {self.calls}." for number in range(config.count)]


def test_sampled_texts_are_documents_of_train_by_the_same_coins(source: Path, prepared: Path, tmp_path: Path) -> None:
    manifest = prepare(settings(tmp_path / "p", source, prepared, **SAMPLED), progress=False, sampler=Sampler())
    canaries = load_canaries(tmp_path / "p", manifest)
    assert [canary.text for canary in canaries] == [f"Sampled {number} in call 1." for number in range(30)]
    assert {(canary.prefix, canary.secret) for canary in canaries} == {("", "")}
    coins = [canary.included for canary in draw_canaries(CanaryConfig(count=30, seed=5), 0)]
    assert [canary.included for canary in canaries] == coins, "coins depend on the seed alone"
    table = DataFolder(tmp_path / "p").documents("train").to_pylist()
    assert {row["doc"] for row in table} >= {canary.doc for canary in canaries if canary.included}
    assert manifest.config["canaries"]["temperature"] == 1
    assert manifest.canaries is not None
    assert manifest.canaries.seen is None


def test_a_second_start_and_parts_go_on_with_what_was_sampled(
    source: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler()
    prepare(settings(tmp_path / "whole", source, prepared, **SAMPLED), progress=False, sampler=Sampler())
    config = settings(tmp_path / "p", source, prepared, **SAMPLED)
    for number in (1, 2):
        prepare_part(config, Part(number, 2), progress=False)
    assert sampler.calls == 0
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_splits", lambda *_args, **_more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(config, progress=False, sampler=sampler)
    finish(config, progress=False, sampler=sampler)
    assert sampler.calls == 1
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_without_a_sampler_or_with_equal_texts_nothing_is_written(source: Path, prepared: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "p", source, prepared, **SAMPLED)
    with pytest.raises(DataError, match=r"data\.canaries\.kind: .*`dualtok prepare`"):
        prepare(config, progress=False)
    assert not (tmp_path / "p").exists(), "said before the corpus is read"
    for wrong in (["same"] * 30, [*(str(number) for number in range(29)), ""]):
        with pytest.raises(DataError, match=r"data\.canaries\.temperature"):
            prepare(config, progress=False, sampler=lambda _config, wrong=wrong: wrong)
    long = [f"{number} " * 200 for number in range(30)]
    with pytest.raises(DataError, match=r"data\.canaries\.tokens: a canary has"):
        prepare(config, progress=False, sampler=lambda _config: long)
    assert prepare(config, progress=False, sampler=Sampler()).canaries is not None, "the folder can be used again"


@pytest.fixture(scope="module")
def rare(source: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rare") / "p"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
        prepare(settings(folder, source, prepared, kind="new_tokens"), progress=False)
    return folder


def test_each_canary_ends_in_a_token_of_its_own_and_the_rarest_are_taken(rare: Path, source: Path) -> None:
    manifest, tokenizer = load_manifest(rare), load_tokenizer(rare / "tokenizer")
    canaries = load_canaries(rare, manifest)
    # The same count from the blocks of a folder without canaries' own documents.
    seen: Counter[int] = Counter()
    for split in manifest.splits:
        for batch, rows in DataFolder(rare).open(split).sequential(4):
            for ids, row in zip(batch["input_ids"].tolist(), rows, strict=True):
                column = 0
                for doc, _, length in row:
                    if doc < manifest.documents_read:
                        seen.update(ids[column : column + length])
                    column += length
    ends = [ids[-2] for ids in encode(tokenizer, [canary.text for canary in canaries])]
    assert len(set(ends)) == 30
    assert manifest.canaries is not None
    assert manifest.canaries.seen == max(seen[token] for token in ends)
    assert f"at most {manifest.canaries.seen:,} times" in summary(manifest)
    for canary, token in zip(canaries, ends, strict=True):
        assert canary.text == f"{canary.prefix} {canary.secret}"
        prefix = encode(tokenizer, [canary.prefix])[0][:-1]
        assert encode(tokenizer, [canary.text])[0][:-1] == [*prefix, token]
    others = [
        token
        for token in range(len(tokenizer))
        if token not in ends and token not in tokenizer.all_special_ids and seen[token] < manifest.canaries.seen
    ]
    for token in others:  # rarer, but no word of its own after a prefix
        text = f"{canaries[0].prefix} {tokenizer.decode([token]).strip()}"
        prefix = encode(tokenizer, [canaries[0].prefix])[0][:-1]
        assert encode(tokenizer, [text])[0][:-1] != [*prefix, token]


def test_rare_tokens_are_the_same_however_prepared(rare: Path, source: Path, prepared: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "p", source, prepared, kind="new_tokens")
    for number in (2, 1):
        prepare_part(config, Part(number, 2), progress=False)
    finish(config, progress=False)
    assert contents(tmp_path / "p") == contents(rare)


def test_more_canaries_than_such_tokens_are_refused(source: Path, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.canaries\.count: the tokenizer has only \d+ tokens"):
        prepare(settings(tmp_path / "p", source, prepared, kind="new_tokens", count=5000), progress=False)


def test_folders_that_are_older_than_these_kinds_stay_usable(source: Path, prepared: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "p", source, prepared, length=4)
    manifest = prepare(config, progress=False)
    assert set(manifest.config["canaries"]) == {"count", "kind", "length", "prefix", "seed"}
    assert json.loads((tmp_path / "p" / "prepare.json").read_text())["canaries"] == manifest.config["canaries"]
    assert prepare(config, progress=False) == manifest
    assert section_of(config)["canaries"]["model"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "high_temperature"}, r"data\.canaries\.model: missing"),
        ({"temperature": 1.5}, r"data\.canaries\.temperature: has no effect with kind digits"),
        ({"kind": "new_tokens", "model": "x"}, r"data\.canaries\.model: has no effect with kind new_tokens"),
        ({"kind": "new_tokens", "length": 4}, r"data\.canaries\.length: has no effect with kind new_tokens"),
        ({**SAMPLED, "prefix": "My name is"}, r"data\.canaries\.prefix: has no effect with kind high_temperature"),
        ({**SAMPLED, "length": 3}, r"data\.canaries\.length: has no effect"),
        ({**SAMPLED, "temperature": 0}, "greater than 0"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CanaryConfig(**{"count": 6, **changes})
