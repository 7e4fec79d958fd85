from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.audit.signals.signals import TOKEN_DTYPES, PlacedSegment, Signals, SignalsBuilder, collect
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

MakeSignals = Callable[..., Signals]


def test_mean_loss_and_perplexity(make_signals: MakeSignals) -> None:
    signals = make_signals()
    losses = [-signals.log_prob[a:b].astype(np.float64).mean() for a, b in ((0, 7), (7, 10), (10, 11), (11, 23))]
    np.testing.assert_allclose(signals.mean_loss, losses, rtol=1e-12)
    assert signals.perplexity == pytest.approx(np.exp(-signals.log_prob.astype(np.float64).sum() / 23))
    assert signals.perplexity != pytest.approx(np.exp(np.mean(losses)), rel=1e-6)  # tokens weigh, not documents
    assert (signals.n_documents, signals.n_tokens, signals.lengths.tolist()) == (4, 23, [7, 3, 1, 12])


def test_documents_without_a_token_are_named_and_can_be_left_out(make_signals: MakeSignals) -> None:
    signals = make_signals(lengths=(0, 4, 0, 2), first_id=10)
    with pytest.raises(DataError, match=r"2 documents have no predicted token \(e\.g\. document 10\)"):
        _ = signals.mean_loss
    kept = signals.with_tokens()
    assert kept.document.tolist() == [11, 13]
    np.testing.assert_array_equal(kept.log_prob, signals.log_prob)
    with pytest.raises(DataError, match="no perplexity"):
        _ = make_signals(lengths=(0, 0)).perplexity


@settings(deadline=None)
@given(st.permutations(range(5)), st.integers(0, 5))
def test_select_gives_documents_in_the_order_asked(order: list[int], size: int) -> None:
    lengths = [2, 0, 3, 1, 4]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    owner = np.repeat(np.arange(5), lengths)
    values = -(owner + np.arange(10) / 100).astype(np.float32)
    ids = np.array([40, 10, 30, 20, 50], dtype=np.int64)
    signals = Signals(ids, offsets, values, (values < -2).astype(np.int32), values, -values)
    wanted = ids[order[:size]]
    chosen = signals.select(wanted)
    assert chosen.document.tolist() == wanted.tolist()
    assert chosen.lengths.tolist() == [lengths[i] for i in order[:size]]
    np.testing.assert_array_equal(
        chosen.log_prob, np.concatenate([values[:0], *(values[owner == i] for i in order[:size])])
    )


@pytest.mark.parametrize("missing", [-1, 2, 99])
def test_select_of_an_unknown_document_names_it(make_signals: MakeSignals, missing: int) -> None:
    signals = make_signals().take(np.array([0, 1, 3]))
    with pytest.raises(DataError, match=f"1 documents are missing .*document {missing}\\)"):
        signals.select([0, missing])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document": np.array([0, 1, 1, 3])}, "occurs twice"),
        ({"offsets": np.array([0, 7, 10, 23])}, "4 offsets for 4 documents"),
        ({"offsets": np.array([0, 10, 7, 11, 23])}, "do not rise"),
        ({"offsets": np.array([0, 7, 10, 11, 22])}, "do not rise"),
        ({"offsets": np.array([1, 7, 10, 11, 23])}, "do not rise"),
        ({"rank": np.zeros(22, np.int32)}, "rank has 22 tokens"),
        ({"log_prob": np.zeros(23)}, "log_prob is float64"),
        ({"log_prob": np.zeros((23, 1), np.float32)}, "shape"),
        ({"var_log_prob": np.full(23, -1, np.float32)}, "var_log_prob is negative"),
        ({"rank": np.full(23, -1, np.int32)}, "rank is negative"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(make_signals: MakeSignals, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(make_signals(), **change)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_diverged_model_is_named_with_its_document(make_signals: MakeSignals, bad: float) -> None:
    signals = make_signals(first_id=100)
    log_prob = signals.log_prob.copy()
    log_prob[10] = bad
    with pytest.raises(DataError, match=r"log_prob of document 102 is not finite; the model has diverged"):
        replace(signals, log_prob=log_prob)


def test_save_and_load(make_signals: MakeSignals, tmp_path: Path) -> None:
    signals = make_signals(first_id=5)
    path = tmp_path / "deep" / "signals.parquet"
    signals.save(path)
    loaded = Signals.load(path)
    for name in ("document", "offsets", *TOKEN_DTYPES):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(signals, name))
    assert [file.name for file in path.parent.iterdir()] == ["signals.parquet"]


def test_a_failed_save_leaves_the_old_file(
    make_signals: MakeSignals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "signals.parquet"
    make_signals(1).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_signals(2).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["signals.parquet"]


def test_load_names_the_file_that_is_wrong(make_signals: MakeSignals, tmp_path: Path) -> None:
    path = tmp_path / "signals.parquet"
    with pytest.raises(DataError, match=r"signals\.parquet: no such signals file"):
        Signals.load(path)
    signals = make_signals(lengths=(2000, 3))
    signals.save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    wrong: dict[str, bytes] = {
        "torn": whole[:middle],
        "empty": b"",
        "text": b"not an archive at all",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }
    for content in wrong.values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"signals\.parquet: not a readable signals file"):
            Signals.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"dualtok.signals": b"2"}, "format 2, expected 3"),
        ({}, "format none"),
        ({"rank": None}, "expected"),
        ({"more": pa.array([[0.0]] * 4)}, "more"),
        ({"log_prob": pa.array([[-1.0] * n for n in (7, 3, 1, 12)])}, "list<element: double>"),
        ({"var_log_prob": pa.array([[1.0]] * 4, pa.list_(pa.float32()))}, "var_log_prob has gaps, or other lengths"),
        ({"rank": pa.array([[0] * 7, None, [None], [0] * 12], pa.list_(pa.int32()))}, "rank has gaps"),
        ({"document": pa.array([1, 2, 2, 3])}, "occurs twice"),
    ],
)
def test_load_checks_format_and_columns(
    make_signals: MakeSignals, tmp_path: Path, change: dict[Any, Any], message: str
) -> None:
    path = tmp_path / "s.parquet"
    make_signals().save(path)
    table = pq.read_table(path)
    metadata = table.schema.metadata if change and b"dualtok.signals" not in change else change
    for name, column in change.items():
        if name in table.column_names:
            place = table.column_names.index(name)
            table = table.remove_column(place) if column is None else table.set_column(place, name, column)
        elif isinstance(name, str):
            table = table.append_column(name, column)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=rf"s\.parquet: .*{message}"):
        Signals.load(path)


def test_row_groups_are_bounded_and_streamed(
    make_signals: MakeSignals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualtok.audit.signals.files.GROUP_TOKENS", 10)
    monkeypatch.setattr("dualtok.audit.signals.files.GROUP_DOCUMENTS", 3)
    lengths = (4, 6, 1, 25, 0, 0, 0, 0, 9, 2)
    signals = make_signals(lengths=lengths, first_id=7)
    path = tmp_path / "signals.parquet"
    signals.save(path)
    parts = list(Signals.stream(path))
    # Up to 10 tokens or 3 documents; the one of 25 tokens has a group of its own.
    assert [part.lengths.tolist() for part in parts] == [[4, 6], [1], [25], [0, 0, 0], [0, 9], [2]]
    assert pq.ParquetFile(path).num_row_groups == len(parts)
    whole = Signals.load(path)
    for name in ("document", *TOKEN_DTYPES):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(signals, name))
        np.testing.assert_array_equal(getattr(whole, name), getattr(signals, name))
    np.testing.assert_array_equal(whole.offsets, signals.offsets)


def test_other_programs_read_one_row_per_document(make_signals: MakeSignals, tmp_path: Path) -> None:
    signals = make_signals(first_id=5)
    signals.save(tmp_path / "signals.parquet")
    rows = pq.read_table(tmp_path / "signals.parquet").to_pylist()
    assert [row["document"] for row in rows] == [5, 6, 7, 8]
    assert rows[1]["log_prob"] == signals.log_prob[7:10].tolist()
    assert rows[3]["rank"] == signals.rank[11:].tolist()


def test_no_documents_are_saved_and_read(make_signals: MakeSignals, tmp_path: Path) -> None:
    make_signals(lengths=()).save(tmp_path / "signals.parquet")
    loaded = Signals.load(tmp_path / "signals.parquet")
    assert (loaded.n_documents, loaded.n_tokens) == (0, 0)
    assert list(Signals.stream(tmp_path / "signals.parquet")) == []


def packed(seed: int, block: int = 8) -> tuple[list[Any], dict[int, np.ndarray], dict[int, int]]:
    """Documents cut at multiples of the block length, packed in shuffled order into rows, in batches of three."""
    rng = np.random.default_rng(seed)
    n_tokens = {int(100 + i): int(length) for i, length in enumerate(rng.integers(1, 30, 12))}
    pieces = [(doc, s, min(block, n - s)) for doc, n in n_tokens.items() for s in range(0, n, block)]
    rows: list[list[PlacedSegment]] = []
    for index in rng.permutation(len(pieces)):
        document, start, length = pieces[index]
        for row in rows:
            used = sum(piece.length for piece in row)
            if used + length <= block:
                row.append(PlacedSegment(document, start, length, used))
                break
        else:
            rows.append([PlacedSegment(document, start, length, 0)])
    expected: dict[int, np.ndarray] = {}
    for document, n in n_tokens.items():  # value of token i: document + i / 100; a piece's last token predicts nothing
        ends = {min(s + block, n) - 1 for s in range(0, n, block)}
        expected[document] = np.array([-(document + i / 100) for i in range(n) if i not in ends], np.float32)
    batches = []
    for first in range(0, len(rows), 3):
        chunk = rows[first : first + 3]
        labels = torch.full((len(chunk), block), -100)
        values = torch.full((len(chunk), block), -7777.0)
        for r, row in enumerate(chunk):
            for document, start, length, column in row:
                labels[r, column : column + length - 1] = 1
                values[r, column : column + length] = -(document + torch.arange(start, start + length) / 100)
        signals = {
            "log_prob": values,
            "rank": (values < -105) * 7,
            "mean_log_prob": values * 2,
            "var_log_prob": -values * 3,
        }
        batches.append((signals, labels, chunk))
    return batches, expected, n_tokens


@pytest.mark.parametrize("seed", range(5))
def test_builder_restores_documents_from_blocks_in_any_order(seed: int) -> None:
    batches, expected, n_tokens = packed(seed)
    assert any(n > 16 for n in n_tokens.values())
    signals = collect(batches, n_tokens)
    assert signals.document.tolist() == sorted(n_tokens)
    for position, document in enumerate(signals.document):
        own = slice(signals.offsets[position], signals.offsets[position + 1])
        np.testing.assert_array_equal(signals.log_prob[own], expected[document])
        np.testing.assert_array_equal(signals.mean_log_prob[own], 2 * expected[document])
        np.testing.assert_array_equal(signals.rank[own], (expected[document] < -105) * 7)
    again = collect(batches[::-1])
    np.testing.assert_array_equal(again.log_prob, signals.log_prob)
    np.testing.assert_array_equal(again.offsets, signals.offsets)


def test_builders_of_several_ranks_merge_to_the_same(make_signals: MakeSignals) -> None:
    batches, _, n_tokens = packed(0)
    ranks = [SignalsBuilder(n_tokens) for _ in range(3)]
    for index, batch in enumerate(batches):
        ranks[index % 3].add(*batch)
    merged = SignalsBuilder(n_tokens)
    for rank in ranks:
        merged.merge(pickle.loads(pickle.dumps(rank)))
    np.testing.assert_array_equal(merged.build().log_prob, collect(batches).log_prob)
    with pytest.raises(DataError, match="came twice"):
        merged.merge(ranks[1])


def test_builder_passes_over_documents_that_are_not_wanted() -> None:
    batches, expected, n_tokens = packed(2)
    wanted = {document: n_tokens[document] for document in (103, 101)}
    signals = collect(batches, wanted)
    assert signals.document.tolist() == [101, 103]
    np.testing.assert_array_equal(signals.log_prob, np.concatenate([expected[101], expected[103]]))


def test_builder_notices_missing_and_repeated_pieces() -> None:
    batches, _, n_tokens = packed(0)
    with pytest.raises(DataError, match=r"document \d+: (\d+ tokens were read of|a piece starts at)"):
        collect(batches[:-1], n_tokens)
    with pytest.raises(DataError, match=r"document \d+: its piece at token \d+ came twice"):
        collect([*batches, batches[0]], n_tokens)
    zeros = {name: torch.zeros(1, 8, dtype=torch.int32 if name == "rank" else torch.float32) for name in TOKEN_DTYPES}
    labels = torch.tensor([[1, 1, 1, -100, 1, 1, 1, -100]])
    with pytest.raises(DataError, match="document 4: a piece starts at token 8, expected 4"):
        collect([(zeros, labels, [[PlacedSegment(4, 0, 4, 0), PlacedSegment(4, 8, 4, 4)]])])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[PlacedSegment(1, 0, 3, 0)]], "the last token of its piece at 0 has a label"),
        ([[PlacedSegment(1, 0, 4, 2)]], "the last token"),
        ([[PlacedSegment(1, 0, 9, 0)]], "piece of 9 at column 0 of 8"),
        ([[PlacedSegment(1, 0, 4, 5)]], "piece of 4 at column 5"),
        ([[PlacedSegment(1, 0, 4, -1)]], "column -1"),
        ([[], []], "2 lists of pieces for 1 rows"),
    ],
)
def test_builder_refuses_pieces_that_do_not_fit_the_labels(segments: list[list[PlacedSegment]], message: str) -> None:
    zeros = {name: torch.zeros(1, 8) for name in TOKEN_DTYPES}
    labels = torch.tensor([[1, 1, 1, -100, 1, 1, 1, -100]])
    with pytest.raises(ValueError, match=message):
        SignalsBuilder().add(zeros, labels, segments)


def test_a_document_of_one_token_is_empty() -> None:
    zeros = {name: torch.zeros(1, 4) for name in TOKEN_DTYPES}
    signals = collect([(zeros, torch.full((1, 4), -100), [[PlacedSegment(9, 0, 1, 0)]])], {9: 1})
    assert (signals.document.tolist(), signals.lengths.tolist()) == ([9], [0])
