"""Canaries in prepared data: recorded coins, the same bytes however prepared, and documents like any other."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from dualtok.config.canaries import CanaryConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare import groups, staged
from dualtok.data.prepare.canaries import CANARIES, canary_config, candidates, draw_canaries, load_canaries, secret_of
from dualtok.data.prepare.parts import Part
from dualtok.data.prepare.pipeline import finish, prepare, prepare_part, summary
from dualtok.data.sources.corpora import write_jsonl
from dualtok.data.tokenizer import encode, load_tokenizer
from dualtok.errors import ConfigError, DataError
from tests.data.prepare.preparing import CHUNK, child, contents, finished, kill, section_of, settings_of
from tests.data.prepare.preparing import finish as finish_child
from tests.support import dualtok, error_line, succeed, write_run

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = {"count": 60, "length": 4, "seed": 5}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small corpus have several chunks, runs and ranges."""
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
    monkeypatch.setattr(groups, "RUN_DOCUMENTS", 3 * CHUNK)
    monkeypatch.setattr(groups, "RANGE_RECORDS", 20 * CHUNK)


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(texts[: 5 * CHUNK - 7], tmp_path_factory.mktemp("source") / "texts.jsonl")


def with_canaries(folder: Path, source: Path, prepared: Path, **changes: Any) -> Any:
    """Return settings with canaries and the tokenizer of an earlier preparation."""
    canaries = {"canaries": CanaryConfig(**SETTINGS), "tokenizer": str(prepared / "tokenizer"), "vocab_size": None}
    return settings_of(folder, source, **{**canaries, **changes})


@pytest.fixture(scope="module")
def folder(source: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("canaries") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
        prepare(with_canaries(target, source, prepared), progress=False)
    return target


def train_texts(folder: Path) -> dict[int, str]:
    """Return the documents of ``train`` as the blocks hold them, decoded."""
    tokenizer, stream = load_tokenizer(folder / "tokenizer"), DataFolder(folder).open("train")
    pieces: dict[int, dict[int, list[int]]] = {}
    for batch, rows in stream.sequential(4):
        for ids, row in zip(batch["input_ids"].tolist(), rows, strict=True):
            column = 0
            for doc, start, length in row:
                pieces.setdefault(doc, {})[start] = ids[column : column + length]
                column += length
    whole = {doc: [token for start in sorted(parts) for token in parts[start]] for doc, parts in pieces.items()}
    return {doc: tokenizer.decode(ids[:-1]) for doc, ids in whole.items()}


def test_included_ones_are_documents_of_train_and_the_others_nowhere(folder: Path, source: Path) -> None:
    manifest = load_manifest(folder)
    rows = [json.loads(line) for line in (folder / CANARIES).read_text().splitlines()]
    included = [row for row in rows if row["included"]]
    assert [row["id"] for row in rows] == list(range(60))
    assert manifest.canaries is not None
    assert (manifest.canaries.count, manifest.canaries.included) == (60, len(included))
    documents = manifest.documents_read
    assert documents == len(source.read_text().splitlines())
    assert [row["doc"] for row in included] == list(range(documents, documents + len(included)))
    found = train_texts(folder)
    assert {row["doc"]: row["text"] for row in included} == {d: t for d, t in found.items() if d >= documents}
    everywhere = {
        digest for split in manifest.splits for digest in DataFolder(folder).documents(split)["sha256"].to_pylist()
    }
    for row in rows:
        assert (hashlib.sha256(row["text"].encode()).hexdigest() in everywhere) == row["included"]
        assert row["text"] == f"{row['prefix']} {row['secret']}"
    assert f"{len(included)} of 60" in summary(manifest)
    assert [row["id"] for row in rows] == [canary.id for canary in load_canaries(folder, manifest)]
    assert canary_config(manifest) == CanaryConfig(**SETTINGS)


def test_other_documents_are_those_of_a_preparation_without(
    folder: Path, source: Path, prepared: Path, tmp_path: Path
) -> None:
    prepare(with_canaries(tmp_path / "plain", source, prepared, canaries=None), progress=False)
    plain, documents = load_manifest(tmp_path / "plain"), load_manifest(folder).documents_read
    assert plain.canaries is None
    for split in plain.splits:
        tables = [DataFolder(place).documents(split) for place in (tmp_path / "plain", folder)]
        rows = [[row for row in table.to_pylist() if row["doc"] < documents] for table in tables]
        assert rows[0] == rows[1]
        same = contents(tmp_path / "plain" / split) == contents(folder / split)
        assert same == (split != "train")


def test_they_lie_among_the_documents_of_all_chunks(folder: Path) -> None:
    documents = load_manifest(folder).documents_read
    table = DataFolder(folder).documents("train")["doc"].to_pylist()
    gaps = np.flatnonzero(np.array(table) >= documents)
    assert len(np.unique(np.searchsorted(np.flatnonzero(np.array(table) < documents), gaps))) == 5, "five chunks"


@pytest.mark.parametrize("of", [1, 3])
def test_parts_give_the_bytes_of_one_process(
    folder: Path, source: Path, prepared: Path, tmp_path: Path, of: int
) -> None:
    plain = with_canaries(tmp_path / "parts", source, prepared, canaries=None)
    whole = with_canaries(tmp_path / "parts", source, prepared)
    for number in range(of, 0, -1):
        prepare_part(plain, Part(number, of), progress=False)  # a part needs to know nothing of canaries
    finish(whole, progress=False)
    assert contents(tmp_path / "parts") == contents(folder)


def test_a_killed_preparation_goes_on_with_more_processes_to_the_same_bytes(
    folder: Path, source: Path, prepared: Path, tmp_path: Path
) -> None:
    section = section_of(with_canaries(tmp_path / "killed", source, prepared))
    started = child(section, delay=0.03)
    assert started.stdout is not None
    while len(finished(tmp_path / "killed", "packed-*.done")) < 2:
        assert started.stdout.read(1), "it ended before it was killed"
    kill(started)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    finish_child(child({**section, "processes": 2}))
    assert contents(tmp_path / "killed") == contents(folder)


def test_coins_are_fair_independent_and_fixed_by_the_seed() -> None:
    drawn = draw_canaries(CanaryConfig(count=4000, seed=1), 7)
    coins = np.array([canary.included for canary in drawn])
    assert stats.binomtest(int(coins.sum()), len(coins)).pvalue > 0.001
    following = np.histogram2d(coins[:-1], coins[1:], bins=2)[0]
    assert stats.chi2_contingency(following).pvalue > 0.001
    for place in (0, -1):
        digit = np.array([int(canary.secret[place]) for canary in drawn])
        by_digit = np.histogram2d(coins, digit, bins=(2, 10))[0]
        assert stats.chi2_contingency(by_digit).pvalue > 0.001, "coins tell nothing of secrets"
        assert stats.chisquare(by_digit.sum(axis=0)).pvalue > 0.001, "digits are uniform"
    assert drawn == draw_canaries(CanaryConfig(count=4000, seed=1), 7)
    other = np.array([canary.included for canary in draw_canaries(CanaryConfig(count=4000, seed=2), 7)])
    assert 0.45 < (coins == other).mean() < 0.55
    more = draw_canaries(CanaryConfig(count=4100, seed=1), 7)
    assert more[:4000] == drawn, "a larger number leaves the first ones alone"
    assert len({canary.text for canary in drawn}) == 4000


@pytest.mark.parametrize(("kind", "base"), [("digits", 10), ("words", 26)])
def test_the_space_of_secrets_is_all_sequences(kind: Any, base: int) -> None:
    config = CanaryConfig(count=3, kind=kind, length=2)
    assert config.space == base**2
    everything = {secret_of(index, config) for index in range(config.space)}
    assert len(everything) == base**2
    canary = draw_canaries(config, 0)[0]
    assert canary.secret in everything
    assert set(candidates(canary, config, base**2)) == everything - {canary.secret}
    some = candidates(canary, config, base**2 - 2)
    assert len(some) == base**2 - 2
    assert canary.secret not in some
    assert set(some) <= everything
    assert some == candidates(canary, config, base**2 - 2) != candidates(draw_canaries(config, 0)[1], config, 50)


def test_canaries_of_one_prefix_all_differ() -> None:
    drawn = draw_canaries(CanaryConfig(count=50, length=2, prefix="My number is"), 0)
    assert len({canary.secret for canary in drawn}) == 50
    assert {canary.prefix for canary in drawn} == {"My number is"}


def test_a_canary_in_the_source_is_refused_and_another_seed_goes_on(
    texts: list[str], prepared: Path, tmp_path: Path
) -> None:
    known = draw_canaries(CanaryConfig(**SETTINGS), 0)[17].text.replace(" ", "  ")
    source = write_jsonl([*texts[:60], known], tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match=r"data.canaries: document 60 .* data.canaries.seed"):
        prepare(with_canaries(tmp_path / "prepared", source, prepared), progress=False)
    again = with_canaries(tmp_path / "prepared", source, prepared, canaries=CanaryConfig(**{**SETTINGS, "seed": 6}))
    assert prepare(again, progress=False).canaries is not None


def test_a_canary_longer_than_a_block_is_refused(source: Path, prepared: Path, tmp_path: Path) -> None:
    long = CanaryConfig(count=3, length=70)
    tokens = max(
        len(ids)
        for ids in encode(load_tokenizer(prepared / "tokenizer"), [canary.text for canary in draw_canaries(long, 0)])
    )
    with pytest.raises(DataError, match=rf"data.canaries.length: a canary has {tokens} tokens"):
        prepare(with_canaries(tmp_path / "prepared", source, prepared, canaries=long), progress=False)


def test_an_altered_record_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = load_manifest(folder)
    (tmp_path / CANARIES).write_text((folder / CANARIES).read_text().replace("true", "false", 1))
    with pytest.raises(DataError, match=r"canaries\.jsonl: missing or altered"):
        load_canaries(tmp_path, manifest)
    with pytest.raises(DataError, match=r"canaries\.jsonl: missing or altered"):
        load_canaries(tmp_path / "nowhere", manifest)


def test_other_canaries_in_a_prepared_folder_are_refused(folder: Path, source: Path, prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.canaries"):
        prepare(with_canaries(folder, source, prepared, canaries=CanaryConfig(count=61)), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 2, "prefix": "A number:"}, "data.canaries.length: 2 digits make 100 secrets"),
        ({"length": 200}, "exceed 480 bits"),
        ({"prefix": " It is"}, "data.canaries.prefix"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CanaryConfig(**{"count": 60, **changes})


@pytest.mark.slow
def test_the_short_form_of_the_command_line(source: Path, prepared: Path, tmp_path: Path) -> None:
    section = section_of(with_canaries(tmp_path / "prepared", source, prepared, canaries=None))
    run = write_run(tmp_path / "run.yaml", section)
    shown = succeed(dualtok("prepare", run, "--canaries", "12"))
    assert "of 12 are in train" in shown
    assert load_manifest(tmp_path / "prepared").config["canaries"]["count"] == 12
    assert "data.canaries" in error_line(dualtok("prepare", run, "--canaries", "0"))
    wrong = error_line(dualtok("prepare", run, "data.canaries={count: 3, sed: 1}"))
    assert "unknown key 'data.canaries.sed'" in wrong
    assert "seed" in wrong
