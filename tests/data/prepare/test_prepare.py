"""Preparation: disjoint splits, right counts, the same bytes however it was run."""

from __future__ import annotations

import random
import re
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.data import SPLITS
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import check_shard, load_manifest
from dualtok.data.prepare import assemble, staged
from dualtok.data.prepare.deduplicate import normalized
from dualtok.data.prepare.pipeline import prepare, summary
from dualtok.data.prepare.splits import assign_split, content_digest, uniform
from dualtok.data.sources.corpora import write_jsonl
from dualtok.data.tokenizer import encode, fingerprint, load_tokenizer
from dualtok.errors import ConfigError, DataError
from tests.data.prepare.preparing import CHUNK, PASSAGES, child, contents, finish, finished, settings_of, sha256
from tests.data.support import SHARES

if TYPE_CHECKING:
    from pathlib import Path


def splits_of(folder: Path) -> dict[str, str]:
    """Return each document's split by the SHA-256 of its text."""
    return {
        digest: split
        for split in load_manifest(folder).splits
        for digest in DataFolder(folder).documents(split)["sha256"].to_pylist()
    }


def test_all_six_splits_are_disjoint_and_hold_no_duplicate(prepared: Path, texts: list[str]) -> None:
    manifest = load_manifest(prepared)
    assert tuple(manifest.splits) == SPLITS
    tables = {split: DataFolder(prepared).documents(split) for split in SPLITS}
    digests = [digest for table in tables.values() for digest in table["sha256"].to_pylist()]
    docs = [doc for table in tables.values() for doc in table["doc"].to_pylist()]
    assert len(set(digests)) == len(digests) == sum(entry.documents for entry in manifest.splits.values())
    assert len(set(docs)) == len(docs)
    by_digest = {sha256(text): normalized(text) for text in texts}
    kept = [by_digest[digest] for digest in digests]
    assert len(set(kept)) == len(kept)
    near = [text for text in kept if text.endswith("Finis.")]
    assert not {text.removesuffix(" Finis.") for text in near} & set(kept)


def test_the_manifest_counts_what_happened(prepared: Path, texts: list[str]) -> None:
    manifest = load_manifest(prepared)
    assert manifest.documents_read == len(texts) == PASSAGES + 75
    assert manifest.too_short == 5
    assert manifest.exact_duplicates == 40
    assert manifest.near_duplicates >= 30
    kept = sum(entry.documents for entry in manifest.splits.values())
    assert manifest.unused == 0
    assert kept == PASSAGES + 70 - 40 - manifest.near_duplicates >= PASSAGES - 20
    assert f"{len(texts):,} documents read" in summary(manifest)


def test_each_document_can_be_read_back_from_the_blocks(prepared: Path, texts: list[str]) -> None:
    manifest = load_manifest(prepared)
    tokenizer = load_tokenizer(prepared / "tokenizer")
    assert manifest.tokenizer_fingerprint == fingerprint(tokenizer)
    assert manifest.vocabulary == len(tokenizer) == 400
    data = DataFolder(prepared)
    for split, entry in manifest.splits.items():
        stream, table = data.open(split), data.documents(split).to_pylist()
        found: dict[int, dict[int, list[int]]] = {}
        blocks = 0
        for batch, pieces in stream.sequential(8):
            for ids, row in zip(batch["input_ids"].tolist(), pieces, strict=True):
                blocks += bool(row)
                column = 0
                for doc, start, length in row:
                    assert start % manifest.block_length == 0
                    found.setdefault(doc, {})[start] = ids[column : column + length]
                    column += length
        assert blocks == entry.blocks == len(stream)
        assert set(found) == {row["doc"] for row in table}
        tokens = predicted = 0
        for row in table:
            text = texts[row["doc"]]  # a document's id is its place in the source
            ids = [token for _, piece in sorted(found[row["doc"]].items()) for token in piece]
            assert ids == encode(tokenizer, [text])[0]
            assert row == {
                "doc": row["doc"],
                "sha256": sha256(text),
                "n_tokens": len(ids),
                "n_characters": len(text),
                "zlib_bytes": len(zlib.compress(text.encode())),
            }
            tokens += len(ids)
            predicted += len(ids) - -(-len(ids) // manifest.block_length)
        assert (entry.documents, entry.tokens, entry.predicted_tokens) == (len(table), tokens, predicted)


def test_each_shard_is_as_the_manifest_says(prepared: Path) -> None:
    for split, entry in load_manifest(prepared).splits.items():
        assert [shard.file for shard in entry.shards] == sorted(
            path.name for path in (prepared / split).glob("shard-*")
        )
        for shard in entry.shards:
            check_shard(prepared / split / shard.file, shard)
            assert shard.file.startswith(f"shard-{shard.lane:05d}-")
            assert shard.rows <= 64
        lanes = [sum(shard.rows for shard in entry.shards if shard.lane == lane) for lane in range(4)]
        assert lanes == [len(range(lane, entry.blocks, 4)) for lane in range(4)]
    assert not (prepared / ".staging").exists()
    assert not list(prepared.rglob("*.tmp"))


def test_a_documents_split_depends_on_its_text_and_the_seed_alone(
    prepared: Path, texts: list[str], passages: list[str], tmp_path: Path
) -> None:
    tokenizer = str(prepared / "tokenizer")
    before = splits_of(prepared)
    other = [*passages, *(f"An unrelated document, number {number}: {number**9}." for number in range(200))]
    random.Random(1).shuffle(other)
    source = write_jsonl(other, tmp_path / "other.jsonl")
    changes: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": None, "near_duplicate_threshold": None}
    prepare(settings_of(tmp_path / "same", source, **changes), progress=False)
    prepare(settings_of(tmp_path / "other", source, **changes, seed=1), progress=False)
    after, reseeded = splits_of(tmp_path / "same"), splits_of(tmp_path / "other")
    common = before.keys() & after.keys()
    assert len(common) > 250
    assert {digest: before[digest] for digest in common} == {digest: after[digest] for digest in common}
    assert after.keys() == reseeded.keys()
    assert sum(after[digest] != reseeded[digest] for digest in after) > 0.4 * len(after)


def test_shares_hold_and_a_document_keeps_its_split_when_the_rest_is_left_out() -> None:
    digests = [content_digest(str(number)) for number in range(20_000)]
    shares = {"train": 0.5, "validation": 0.2, "held_out": 0.1}
    splits = [assign_split(digest, shares, 0) for digest in digests]
    for split, share in (*shares.items(), (None, 0.2)):
        assert abs(splits.count(split) / len(digests) - share) < 0.015
    assert [assign_split(digest, {"train": 0.5}, 0) for digest in digests] == [
        split if split == "train" else None for split in splits
    ]
    assert all(0 <= uniform(0, digest) < 1 for digest in digests)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"block_length": 32},
        {"near_duplicate_threshold": None},
        {"field": "body"},
        {"lanes": 5},
        {"shares": {**SHARES, "train": 0.4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_for_the_same_folder_are_refused(prepared: Path, changes: dict[str, Any]) -> None:
    before = finished(prepared, "*")
    key, value = next(iter(changes.items()))
    with pytest.raises(ConfigError, match=rf"^data\.{key}: {re.escape(repr(value))}, but .* was prepared with"):
        prepare(settings_of(prepared, prepared.parent / "texts.jsonl", **changes), progress=False)
    assert finished(prepared, "*") == before


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
    prepare(settings_of(tmp_path / "two", prepared.parent / "texts.jsonl", processes=2), progress=False)
    assert contents(tmp_path / "two") == contents(prepared)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [f"{draw.randrange(10**6)}" for _ in range(3000)]
    peaks = []
    for documents in (800, 5600):  # with 400, buffers would not be full
        source = write_jsonl(
            (" ".join(draw.choices(words, k=1500)) for _ in range(documents)), tmp_path / f"{documents}.jsonl"
        )
        section = {
            "dir": str(tmp_path / str(documents)),
            "source": str(source),
            "block_length": 256,
            "lanes": 4,
            "vocab_size": 2000,
            "rows_per_shard": 256,
            "shares": {"train": 0.88, "reference": 0.02, "held_out": 0.1},
        }
        peaks.append(finish(child(section, chunk=100, afresh=True)))
    extra = (tmp_path / "5600.jsonl").stat().st_size - (tmp_path / "800.jsonl").stat().st_size
    print(f"peak memory of 800 and 5,600 documents: {peaks} kB; {extra:,} bytes more of text")
    assert extra > 45e6
    # The allocator's peaks differ by up to 24 MB from run to run; the text itself would be 1.
    assert 1024 * (peaks[1] - peaks[0]) < 0.6 * extra


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(["text"], tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match=r"texts\.jsonl: .*not a folder.*data\.dir"):
        prepare(settings_of(source, source), progress=False)
    assert source.read_text() == '{"text": "text"}\n'


def test_a_prepared_folder_inside_the_source_folder_is_not_read(texts: list[str], tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    write_jsonl(texts, source / "texts.jsonl")
    config = settings_of(source / "prepared", source)
    (source / "prepared").mkdir()
    (source / "prepared" / "notes.txt").write_text("not a document")
    assert prepare(config, progress=False).documents_read == len(texts)


def test_the_corpus_is_cut_off_at_max_documents(prepared: Path, texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(texts, tmp_path / "texts.jsonl")
    config = settings_of(
        tmp_path / "prepared", source, max_documents=150, tokenizer=str(prepared / "tokenizer"), vocab_size=None
    )
    assert prepare(config, progress=False).documents_read == 150
    data = DataFolder(tmp_path / "prepared")
    assert max(doc for split in SPLITS for doc in data.documents(split)["doc"].to_pylist()) < 150


def test_blocks_that_lost_tokens_are_noticed(
    prepared: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = assemble.pack_documents
    monkeypatch.setattr(assemble, "pack_documents", lambda documents, *more: real(documents[1:], *more))
    source = write_jsonl(texts, tmp_path / "texts.jsonl")
    config = settings_of(tmp_path / "prepared", source, tokenizer=str(prepared / "tokenizer"), vocab_size=None)
    with pytest.raises(DataError, match="shards hold other tokens than its documents"):
        prepare(config, progress=False)
    assert not (tmp_path / "prepared" / "manifest.json").exists()
