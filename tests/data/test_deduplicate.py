"""Duplicates: exact ones by their normalised text, near ones at a known Jaccard similarity."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dualtok.data.config import DataConfig
from dualtok.data.deduplicate import DuplicateIndex, normalised, sketch
from tests.support import ROOT, environment

WORDS = [f"word{number}" for number in range(5000)]
SHINGLE = 5


def config(**changes: Any) -> DataConfig:
    return DataConfig(dir="unused", **changes)


def verdicts(texts: list[str], settings: DataConfig | None = None) -> list[str | None]:
    """Return for each document in turn why it is dropped, or None."""
    settings = settings or config()
    index = DuplicateIndex(sqlite3.connect(":memory:"), settings)
    return [index.add(number, sketch(text, settings)) for number, text in enumerate(texts)]


def random_words(draw: random.Random, count: int) -> list[str]:
    return draw.choices(WORDS, k=count)


def changed(words: list[str], changes: int, draw: random.Random) -> list[str]:
    """Return the words with so many of them replaced by words from nowhere else."""
    result = words[:]
    for place in draw.sample(range(len(words)), changes):
        result[place] = f"other{draw.randrange(10**9)}"
    return result


def jaccard(a: list[str], b: list[str]) -> float:
    """Return the true similarity of two documents' sets of n-grams."""
    first, second = ({tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)} for words in (a, b))
    return len(first & second) / len(first | second)


def planted_pair(draw: random.Random, low: float, high: float) -> tuple[str, str]:
    """Return two documents with a true similarity in [low, high)."""
    while True:
        words = random_words(draw, draw.randrange(150, 400))
        target = draw.uniform(low, high)
        # A changed word changes five n-grams, fewer where changes are close to each other.
        other = changed(words, round(len(words) * (1 - target) / (1 + target) / SHINGLE * (1.6 - 0.6 * target)), draw)
        if low <= jaccard(words, other) < high:
            return " ".join(words), " ".join(other)


def test_white_space_and_unicode_composition_do_not_count() -> None:
    first = "Café au lait,\n\nplease \u00c5"
    same = ["Cafe\u0301 au lait, please \u212b", "  Café\tau  lait,\u00a0please\u2003A\u030a\n"]
    assert {normalised(text) for text in same} == {normalised(first)}
    assert verdicts([first, *same, first]) == [None, "exact", "exact", "exact"]
    other = ["café au lait, please \u00c5", "Café au lait please \u00c5", "Cafe au lait, please \u00c5", "ﬁ", "fi"]
    assert verdicts([first, *other], config(near_duplicate_threshold=None)) == [None] * 6


def test_one_changed_word_is_near_and_half_of_them_are_not() -> None:
    draw = random.Random(1)
    for _ in range(10):
        words = random_words(draw, 200)
        near, far = changed(words, 1, draw), changed(words, 100, draw)
        assert jaccard(words, near) > 0.9
        assert jaccard(words, far) < 0.2
        assert verdicts([" ".join(text) for text in (words, near, far)]) == [None, "near", None]


def test_the_first_occurrence_wins_and_a_dropped_document_attracts_no_others() -> None:
    draw = random.Random(2)
    chain = [random_words(draw, 200)]
    for _ in range(40):
        chain.append(changed(chain[-1], 1, draw))
    result = verdicts([" ".join(words) for words in chain])
    assert result[:3] == [None, "near", "near"]
    # Each is near its neighbour, but the far end is compared with what was kept only.
    assert jaccard(chain[-2], chain[-1]) > 0.9
    kept = [words for words, verdict in zip(chain, result, strict=True) if verdict is None]
    assert 1 < len(kept) < 20
    assert all(jaccard(a, b) < 0.9 for number, a in enumerate(kept) for b in kept[:number])
    assert verdicts([" ".join(words) for words in (chain[1], chain[0])]) == [None, "near"]


def test_a_null_threshold_keeps_near_duplicates_and_drops_exact_ones() -> None:
    draw = random.Random(3)
    words = random_words(draw, 200)
    texts = [" ".join(words), " ".join(changed(words, 1, draw)), " ".join(words)]
    assert verdicts(texts, config(near_duplicate_threshold=None)) == [None, None, "exact"]


def test_the_threshold_decides() -> None:
    draw = random.Random(4)
    first, second = planted_pair(draw, 0.68, 0.72)
    assert verdicts([first, second]) == [None, None]
    assert verdicts([first, second], config(near_duplicate_threshold=0.5)) == [None, "near"]


def test_documents_shorter_than_an_n_gram_are_compared_whole() -> None:
    assert verdicts(["one two", "two one", "one two three", "one  two", "three"]) == [None, None, None, "exact", None]


@pytest.mark.parametrize(("low", "high", "recall"), [(0.9, 1.0, 0.97), (0.88, 0.92, 0.97)])
def test_planted_near_duplicates_are_found(low: float, high: float, recall: float) -> None:
    draw = random.Random(5)
    pairs = [planted_pair(draw, low, high) for _ in range(200)]
    assert [verdicts([first]) for first, _ in pairs[:3]] == [[None]] * 3
    result = verdicts([first for first, _ in pairs] + [second for _, second in pairs])
    assert result[:200] == [None] * 200
    assert sum(verdict is not None for verdict in result[200:]) / 200 >= recall


def test_dissimilar_documents_are_never_taken_for_duplicates() -> None:
    draw = random.Random(6)
    pairs = [planted_pair(draw, 0.2, 0.5) for _ in range(200)]
    assert verdicts([text for pair in pairs for text in pair]) == [None] * 400


def test_documents_that_share_a_band_are_compared_by_their_whole_signature() -> None:
    draw = random.Random(8)
    pairs = [planted_pair(draw, 0.6, 0.68) for _ in range(100)]
    assert verdicts([text for pair in pairs for text in pair]) == [None] * 200


def test_a_sketch_is_the_same_in_another_process() -> None:
    text = " ".join(random_words(random.Random(7), 100))
    program = (
        "import sys\n"
        "from dualtok.data.config import DataConfig\n"
        "from dualtok.data.deduplicate import sketch\n"
        "s = sketch(sys.argv[1], DataConfig(dir='unused'))\n"
        "print(s.exact.hex(), s.signature.tobytes().hex())"
    )
    here = sketch(text, config())
    assert here.signature is not None
    for seed in ("1", "2"):  # Python's own hashes differ between processes
        there = subprocess.run(
            [sys.executable, "-c", program, text], env=environment(PYTHONHASHSEED=seed), cwd=ROOT, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert there.stdout.split() == [here.exact.hex(), here.signature.tobytes().hex()]


MEASURE = """
import random, re, sqlite3, sys
from pathlib import Path
from dualtok.data.config import DataConfig
from dualtok.data.deduplicate import DuplicateIndex, sketch

path, marks = sys.argv[1], [int(mark) for mark in sys.argv[2:]]
config, draw = DataConfig(dir="unused"), random.Random(0)
connection = sqlite3.connect(path)
connection.execute("PRAGMA journal_mode = WAL")
index = DuplicateIndex(connection, config)
for doc in range(marks[-1]):
    text = " ".join(str(draw.randrange(10**6)) for _ in range(60))
    assert index.add(doc, sketch(text, config)) is None
    if (doc + 1) % 1000 == 0:
        connection.commit()
    if doc + 1 in marks:
        print(*re.findall(r"(?:VmHWM|VmRSS):\\s+(\\d+)", Path("/proc/self/status").read_text()))
connection.close()
"""


@pytest.mark.slow
def test_the_index_lies_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    documents = 20_000
    path = tmp_path / "index.sqlite"
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), "5000", str(documents)], env=environment(), cwd=ROOT, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    (early_peak, early), (late_peak, late) = (map(int, line.split()) for line in result.stdout.splitlines())
    disk = path.stat().st_size / documents
    print(
        f"index: {disk:,.0f} bytes of disk per document; from 5,000 to {documents:,} documents resident memory grew by "
        f"{late - early:,} kB and its peak by {late_peak - early_peak:,} kB"
    )
    assert disk < 1200
    # 15,000 documents more: in memory their signatures and bands alone would take 10 MB.
    assert late - early < 4000
    assert late_peak - early_peak < 4000
