"""Preparation in parts: the bytes of one process, whatever their number, and clear errors where they do not fit."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualtok.data.manifest import load_manifest
from dualtok.data.prepare import groups, parts, staged
from dualtok.data.prepare.parts import COMPLETE, Part, parse_part
from dualtok.data.prepare.pipeline import STAGING, finish, prepare, prepare_part
from dualtok.data.sources.corpora import write_jsonl
from dualtok.errors import ConfigError, DataError
from tests.data.prepare.preparing import CHUNK, child, contents, section_of, settings_of
from tests.data.support import SHARES
from tests.support import dualtok, error_line, succeed, write_run

if TYPE_CHECKING:
    from dualtok.config.data import DataConfig


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small corpus have several chunks, runs and ranges."""
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
    monkeypatch.setattr(groups, "RUN_DOCUMENTS", 3 * CHUNK)
    monkeypatch.setattr(groups, "RANGE_RECORDS", 20 * CHUNK)


def in_parts(config: DataConfig, of: int) -> None:
    """Prepare in parts, in another order than theirs."""
    order = list(range(1, of + 1))
    random.Random(of).shuffle(order)
    for number in order:
        prepare_part(config, Part(number, of), progress=False)
    finish(config, progress=False)


def write_files(folder: Path, texts: list[str], count: int) -> Path:
    """Write the texts to files of very different sizes, one of them empty."""
    draw = random.Random(count)
    cuts = sorted(draw.sample(range(len(texts)), count - 2))
    cuts = [0, *cuts, cuts[-1] if cuts else len(texts) // 2, len(texts)]
    folder.mkdir()
    for number in range(count):
        write_jsonl(texts[cuts[number] : cuts[number + 1]], folder / f"{number}.jsonl")
    return folder


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_any_number_of_parts_gives_the_bytes_of_one_process(prepared: Path, tmp_path: Path, of: int) -> None:
    in_parts(settings_of(tmp_path / "parts", prepared.parent / "texts.jsonl"), of)
    assert contents(tmp_path / "parts") == contents(prepared)


@pytest.mark.parametrize("kind", ["files", "row groups", "fewer files than parts", "at most 77"])
def test_each_way_to_divide_the_source_gives_the_bytes_of_one_process(
    prepared: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    changes: dict[str, Any] = {"tokenizer": str(prepared / "tokenizer"), "vocab_size": None}
    some = texts[: 4 * CHUNK - 7]
    if kind == "row groups":
        source = tmp_path / "texts.parquet"
        pq.write_table(pa.table({"text": some}), source, row_group_size=31)
    else:
        source = write_files(tmp_path / "source", some, 2 if kind == "fewer files than parts" else 7)
    if kind == "at most 77":
        changes["max_documents"] = 77
    prepare(settings_of(tmp_path / "whole", source, **changes), progress=False)
    for of in (2, 5):
        cut = [
            parts.PartReader(settings_of(tmp_path / "cut", source, **changes), Part(n, of)).unit_count for n in (1, of)
        ]
        expected = {"files": 7, "row groups": 7, "fewer files than parts": 2 if of == 2 else None, "at most 77": None}
        assert cut == [expected[kind]] * 2
        in_parts(settings_of(tmp_path / f"in {of}", source, **changes), of)
        assert contents(tmp_path / f"in {of}") == contents(tmp_path / "whole")


def test_there_may_be_more_parts_than_documents(prepared: Path, tmp_path: Path) -> None:
    source = write_jsonl(["the first document of two", "another one than that"], tmp_path / "texts.jsonl")
    changes = {"shares": {"train": 1.0}, "tokenizer": str(prepared / "tokenizer"), "vocab_size": None}
    in_parts(settings_of(tmp_path / "parts", source, **changes), 4)
    assert load_manifest(tmp_path / "parts").splits["train"].documents == 2


def test_a_part_reads_no_others_documents(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(texts, tmp_path / "texts.jsonl")
    lines = source.read_bytes().splitlines(keepends=True)
    lines[101] = b'{"text": \n'  # the 34th of part 3/3
    source.write_bytes(b"".join(lines))
    config = settings_of(tmp_path / "prepared", source)
    prepare_part(config, Part(1, 3), progress=False)
    prepare_part(config, Part(2, 3), progress=False)
    with pytest.raises(DataError, match=r"texts\.jsonl:102: not valid JSON"):
        prepare_part(config, Part(3, 3), progress=False)


def test_a_complete_part_returns_at_once_and_a_finished_folder_too(prepared: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(prepared.parent / "texts.jsonl", tmp_path))
    config = settings_of(tmp_path / "prepared", source)
    for number in (1, 2):
        prepare_part(config, Part(number, 2), progress=False)
    hidden = source.rename(tmp_path / "hidden.jsonl")
    before = contents(tmp_path / "prepared")
    prepare_part(config, Part(2, 2), progress=False)  # without its source nothing could be done again
    assert contents(tmp_path / "prepared").keys() == before.keys()
    manifest = finish(config, progress=False)  # nor does the end need the source
    prepare_part(config, Part(1, 2), progress=False)
    assert finish(config, progress=False) == prepare(config, progress=False) == manifest
    hidden.rename(source)
    assert not (tmp_path / "prepared" / STAGING).exists()


@pytest.fixture
def two_of_three(prepared: Path, tmp_path: Path) -> DataConfig:
    """Return the settings of a folder in which part 2 of 3 is missing."""
    config = settings_of(tmp_path / "prepared", prepared.parent / "texts.jsonl")
    for number in (1, 3):
        prepare_part(config, Part(number, 3), progress=False)
    return config


def test_missing_and_interrupted_parts_are_named(two_of_three: DataConfig) -> None:
    with pytest.raises(DataError, match=r"not all of 3 parts are complete: 2/3 is missing; run"):
        finish(two_of_three, progress=False)
    (Part(3, 3).folder(Path(two_of_three.dir) / STAGING) / COMPLETE).unlink()
    with pytest.raises(DataError, match=r"2/3 is missing, 3/3 was interrupted; run"):
        finish(two_of_three, progress=False)
    with pytest.raises(DataError, match=r"no part is there; run"):
        finish(settings_of(Path(two_of_three.dir).parent / "other", Path(str(two_of_three.source))), progress=False)


def test_parts_of_another_number_and_a_start_in_one_piece_are_refused(two_of_three: DataConfig) -> None:
    with pytest.raises(DataError, match=r"holds parts of 3, so part 1/2 does not fit"):
        prepare_part(two_of_three, Part(1, 2), progress=False)
    with pytest.raises(DataError, match=r"holds parts of 3; complete them and run `dualtok prepare --finish`"):
        prepare(two_of_three, progress=False)
    prepare_part(two_of_three, Part(2, 3), progress=False)
    staging = Path(two_of_three.dir) / STAGING
    shutil.copytree(Part(1, 3).folder(staging), Part(1, 2).folder(staging))
    with pytest.raises(DataError, match=r"parts of 2 and of 3 side by side"):
        finish(two_of_three, progress=False)


@pytest.mark.parametrize("changes", [{"field": "body"}, {"shingle_words": 3}, {"max_documents": 9}])
def test_other_settings_than_the_other_parts_are_refused(two_of_three: DataConfig, changes: dict[str, Any]) -> None:
    key, value = next(iter(changes.items()))
    other = settings_of(Path(two_of_three.dir), Path(str(two_of_three.source)), **changes)
    message = rf"data\.{key}: {value!r}, but part 1/3 in .* was begun with"
    for number in (2, 1):  # a new one and a complete one
        with pytest.raises(ConfigError, match=message):
            prepare_part(other, Part(number, 3), progress=False)
    prepare_part(two_of_three, Part(2, 3), progress=False)
    with pytest.raises(ConfigError, match=message):
        finish(other, progress=False)


def test_what_only_the_end_needs_may_still_change_and_a_hopeless_end_keeps_the_parts(two_of_three: DataConfig) -> None:
    folder, source = Path(two_of_three.dir), Path(str(two_of_three.source))
    prepare_part(two_of_three, Part(2, 3), progress=False)
    before = contents(folder)
    hopeless = settings_of(folder, source, shares={**SHARES, "auxiliary": 1e-9})
    with pytest.raises(DataError, match=r"data\.shares\.auxiliary: .*split empty"):
        finish(hopeless, progress=False)
    assert {name: digest for name, digest in contents(folder).items() if not name.endswith("lock")} == {
        name: digest for name, digest in before.items() if not name.endswith("lock")
    }
    with pytest.raises(DataError, match=r"absent.*data\.tokenizer"):
        finish(settings_of(folder, source, tokenizer="./absent", vocab_size=None), progress=False)
    assert finish(settings_of(folder, source, seed=5), progress=False).seed == 5


def test_a_source_that_changed_between_the_parts_is_noticed(two_of_three: DataConfig, tmp_path: Path) -> None:
    source = tmp_path / "shorter" / "texts.jsonl"
    source.parent.mkdir()
    lines = Path(str(two_of_three.source)).read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(lines[:-9]))
    shorter = settings_of(tmp_path / "elsewhere", source)
    prepare_part(shorter, Part(2, 3), progress=False)
    note = json.loads((Part(1, 3).folder(Path(two_of_three.dir) / STAGING) / parts.BEGUN).read_text())
    place = Part(2, 3).folder(Path(two_of_three.dir) / STAGING)
    shutil.copytree(Part(2, 3).folder(Path(shorter.dir) / STAGING), place)
    (place / parts.BEGUN).write_text(json.dumps(note))
    with pytest.raises(DataError, match=r"parts hold \[\d+, \d+, \d+\] documents, .* it changed between them"):
        finish(two_of_three, progress=False)
    (place / parts.BEGUN).write_text(json.dumps({**note, "listing": "other files"}))
    with pytest.raises(DataError, match="the parts saw different files"):
        finish(two_of_three, progress=False)


def test_files_that_come_between_two_parts_are_noticed(texts: list[str], tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", texts[:40], 3)
    config = settings_of(tmp_path / "prepared", source)
    prepare_part(config, Part(1, 2), progress=False)
    write_jsonl(texts[:3], source / "late.jsonl")
    with pytest.raises(DataError, match=r"part 2/2 sees other files than part 1/2 did"):
        prepare_part(config, Part(2, 2), progress=False)


def test_a_part_that_fails_at_once_leaves_nothing_and_no_other_changed(
    two_of_three: DataConfig, tmp_path: Path
) -> None:
    empty = settings_of(tmp_path / "new", tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        prepare_part(empty, Part(1, 2), progress=False)
    assert not (tmp_path / "new").exists()
    before = contents(Path(two_of_three.dir))
    with pytest.raises(ConfigError):
        prepare_part(
            settings_of(Path(two_of_three.dir), Path(str(two_of_three.source)), field="x"), Part(2, 3), progress=False
        )
    assert contents(Path(two_of_three.dir)) == before


@pytest.mark.slow
def test_a_running_part_is_neither_started_again_nor_finished(two_of_three: DataConfig) -> None:
    process = child(section_of(two_of_three), "2/3", delay=20, afresh=True)
    try:
        deadline = time.monotonic() + 120
        while not (Part(2, 3).folder(Path(two_of_three.dir) / STAGING) / parts.BEGUN).parent.is_dir():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        with pytest.raises(DataError, match=rf"2/3 is still running \(.*process {process.pid}\)"):
            finish(two_of_three, progress=False)
        with pytest.raises(DataError, match=rf"part 2/3 is still running \(.*process {process.pid}\)"):
            prepare_part(two_of_three, Part(2, 3), progress=False)
    finally:
        process.kill()
        process.communicate()
    prepare_part(two_of_three, Part(2, 3), progress=False)  # the lock went with its holder


@pytest.mark.slow
def test_the_command_line_prepares_in_parts_and_ends_with_status_2_on_errors(prepared: Path, tmp_path: Path) -> None:
    source = str(prepared.parent / "texts.jsonl")
    data = {"source": source, "vocab_size": 400, "block_length": 64, "lanes": 4, "shares": SHARES, "min_characters": 20}
    run = write_run(tmp_path / "run.yaml", {"dir": str(tmp_path / "parts"), **data})
    whole = write_run(tmp_path / "whole.yaml", {"dir": str(tmp_path / "whole"), **data})
    assert "part 1/2 is complete" in succeed(dualtok("prepare", run, "--part", "1/2"))
    assert "2/2 is missing" in error_line(dualtok("prepare", run, "--finish"))
    assert "one after the other" in error_line(dualtok("prepare", run, "--finish", "--part", "2/2"))
    succeed(dualtok("prepare", run, "--part", "2/2"))
    assert "documents read" in succeed(dualtok("prepare", run, "--finish"))
    succeed(dualtok("prepare", whole))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1/0"])
def test_a_malformed_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be i/n with 1 <= i <= n"):
        parse_part(text)
