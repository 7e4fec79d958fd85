"""Duplicates: exact ones by their normalized text, near ones at a known Jaccard similarity."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtok.config.data import DataConfig
from dualtok.data.prepare import deduplicate, groups
from dualtok.data.prepare import staged as staged_module
from dualtok.data.prepare.decide import DECISIONS, decide, decisions_path
from dualtok.data.prepare.deduplicate import key_count, keys, normalized, sketch
from dualtok.data.prepare.groups import find_groups
from dualtok.data.prepare.ingest import stage_part
from dualtok.data.prepare.parallel import Workers
from dualtok.data.prepare.parts import ALONE, PartReader
from dualtok.data.prepare.staged import Staged
from dualtok.data.sources.corpora import write_jsonl
from dualtok.monitor.progress import RunProgress
from tests.support import ROOT, environment

WORDS = [f"word{number}" for number in range(5000)]
SHINGLE = 5


def config(folder: str = "unused", **changes: Any) -> DataConfig:
    """Return settings that put each document that is kept into ``train``."""
    return DataConfig(dir=folder, shares={"train": 1.0}, tokenizer="unused", **changes)


def verdicts(texts: list[str], **changes: Any) -> list[str | None]:
    """Return for each document in turn why it is dropped, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = config(name, source=str(write_jsonl(texts, folder / "texts.jsonl")), **changes)
        bar = RunProgress("", None, active=False)
        with Workers(1) as workers:
            stage_part(settings, PartReader(settings, ALONE), ALONE.folder(folder), workers, progress=bar)
            staged = Staged(folder, ALONE.of)
            chunks = decide(settings, staged, find_groups(settings, staged, workers, bar), bar).chunks
        decisions = [DECISIONS[decision] for chunk in chunks for decision in np.load(decisions_path(folder, chunk))]
    assert set(decisions) <= {"train", "exact", "near"}
    return [None if decision == "train" else decision for decision in decisions]


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
    assert {normalized(text) for text in same} == {normalized(first)}
    assert verdicts([first, *same, first]) == [None, "exact", "exact", "exact"]
    other = ["café au lait, please \u00c5", "Café au lait please \u00c5", "Cafe au lait, please \u00c5", "ﬁ", "fi"]
    assert verdicts([first, *other], near_duplicate_threshold=None) == [None] * 6


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
    # Each is near its neighbor, but the far end is compared with what was kept only.
    assert jaccard(chain[-2], chain[-1]) > 0.9
    kept = [words for words, verdict in zip(chain, result, strict=True) if verdict is None]
    assert 1 < len(kept) < 20
    assert all(jaccard(a, b) < 0.9 for number, a in enumerate(kept) for b in kept[:number])
    assert verdicts([" ".join(words) for words in (chain[1], chain[0])]) == [None, "near"]


def test_a_null_threshold_keeps_near_duplicates_and_drops_exact_ones() -> None:
    draw = random.Random(3)
    words = random_words(draw, 200)
    texts = [" ".join(words), " ".join(changed(words, 1, draw)), " ".join(words)]
    assert verdicts(texts, near_duplicate_threshold=None) == [None, None, "exact"]


def test_the_threshold_decides() -> None:
    draw = random.Random(4)
    first, second = planted_pair(draw, 0.68, 0.72)
    assert verdicts([first, second]) == [None, None]
    assert verdicts([first, second], near_duplicate_threshold=0.5) == [None, "near"]


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
        "from dualtok.config.data import DataConfig\n"
        "from dualtok.data.prepare.deduplicate import sketch\n"
        "s = sketch(sys.argv[1], DataConfig(dir='unused'))\n"
        "print(s.exact.hex(), s.signature.tobytes().hex())"
    )
    here = sketch(text, config())
    assert here.signature is not None
    for seed in ("1", "2"):  # Python's own hashes differ between processes
        there = subprocess.run(
            [sys.executable, "-c", program, text],
            env=environment(PYTHONHASHSEED=seed),
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        assert there.stdout.split() == [here.exact.hex(), here.signature.tobytes().hex()]


def test_all_keys_of_equal_texts_agree_and_those_of_others_do_not() -> None:
    draw = random.Random(9)
    settings = config()
    words = random_words(draw, 200)
    texts = [words, words, changed(words, 2, draw), random_words(draw, 200)]
    sketches = [sketch(" ".join(text), settings) for text in texts]
    exact = np.stack([np.frombuffer(one.exact, np.uint8) for one in sketches])
    found = keys(exact, np.stack([one.signature for one in sketches if one.signature is not None]), settings)
    assert found.shape == (4, key_count(settings)) == (4, 15)
    assert (found[0] == found[1]).all()
    assert not (found[0] == found[2])[0]
    assert (found[0] == found[2])[1:].any()
    assert not np.isin(found[3], found[0]).any()


def test_the_estimate_is_as_exact_as_that_many_hash_functions_allow() -> None:
    draw = random.Random(10)
    errors = []
    for _ in range(300):
        words = random_words(draw, 200)
        other = changed(words, draw.randrange(2, 40), draw)
        first, second = (sketch(" ".join(text), config()).signature for text in (words, other))
        assert first is not None
        errors.append(float(np.mean(first == second)) - jaccard(words, other))
    # A share of 128 independent trials has a standard deviation of at most 0.044.
    assert np.std(errors) < 0.05
    assert abs(np.mean(errors)) < 0.01


def test_a_long_document_is_sketched_piece_by_piece_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(random_words(random.Random(11), 3000))
    whole = sketch(text, config()).signature
    monkeypatch.setattr(deduplicate, "SHINGLES_AT_ONCE", 700)
    pieces = sketch(text, config()).signature
    assert whole is not None
    assert pieces is not None
    assert (whole == pieces).all()


def test_groups_are_the_same_however_the_keys_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(12)
    originals = [random_words(draw, 60) for _ in range(150)]
    texts = [*originals, *originals[:30], *(changed(words, 1, draw) for words in originals[30:90])]
    draw.shuffle(texts)
    joined = [" ".join(words) for words in texts]
    whole = verdicts(joined)
    assert whole.count("exact") >= 25
    assert whole.count("near") >= 25
    monkeypatch.setattr(groups, "RUN_DOCUMENTS", 37)
    monkeypatch.setattr(groups, "RANGE_RECORDS", 101)
    monkeypatch.setattr(groups, "DOCUMENTS_AT_ONCE", 10)
    monkeypatch.setattr(staged_module, "CHUNK_DOCUMENTS", 11)
    assert verdicts(joined) == whole


def test_thousands_of_copies_of_one_document_are_compared_with_the_first_alone() -> None:
    draw = random.Random(13)
    words = random_words(draw, 60)
    texts = [" ".join(words), *(" ".join(changed(words, 1, draw)) for _ in range(1500)), *([" ".join(words)] * 1500)]
    started = time.process_time()
    result = verdicts(texts)
    assert result[0] is None
    assert result[1501:] == ["exact"] * 1500
    assert result.count("near") > 1200
    assert time.process_time() - started < 30


SCRIPTS = {
    "Chinese": range(0x4E00, 0x4E00 + 1500),
    "Japanese": [*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)] * 3,
    "Thai": range(0x0E01, 0x0E3B),
    "Khmer": range(0x1780, 0x17B4),
    "rare characters": range(0x20000, 0x20400),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_duplicates_are_found_where_no_spaces_are(script: str) -> None:
    """150 documents twice, the second time with another last character; none of them like another one."""
    draw = random.Random(3)
    letters = [chr(code) for code in SCRIPTS[script]]
    first = ["".join(draw.choices(letters, k=300)) for _ in range(150)]
    found = verdicts([*(text + "。" for text in first), *(text + "!" for text in first)])
    assert found == [None] * 150 + ["near"] * 150


def test_as_many_false_ones_are_found_in_characters_as_in_words() -> None:
    """Documents of a few common phrases and their own text: as alike in both scripts."""
    draw = random.Random(4)
    chinese = [chr(code) for code in SCRIPTS["Chinese"]]
    phrases = ["".join(draw.choices(chinese, k=20)) for _ in range(5)]
    spaced = [" ".join(random_words(draw, 10)) for _ in range(5)]
    texts = [draw.choice(phrases) + "".join(draw.choices(chinese, k=200)) for _ in range(100)]
    words = [f"{draw.choice(spaced)} {' '.join(random_words(draw, 100))}" for _ in range(100)]
    assert verdicts(texts).count("near") == verdicts(words).count("near") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一二三四五", True),
        ("一二三四五 with some English words", False),
        ("東京タワー and 漢字かな交じり文である", True),
        ("русский текст", False),
        ("한국어 문장은 띄어쓰기가 있다", False),
        ("العربية", False),
        ("हिन्दी में", False),
        ("ภาษาไทย", True),
        ("", False),
        ("é" * 9, False),
        ("\U0001f600" * 9, False),
        ("\uff21\uff22", False),
    ],
)
def test_which_texts_are_cut_into_characters(text: str, expected: bool) -> None:
    assert sketch(text, config()).of_characters == expected
    assert sketch(text, config(near_duplicate_threshold=None)).of_characters is False


def test_an_edge_of_a_script_belongs_to_it() -> None:
    for first, last in deduplicate.WITHOUT_SPACES:
        for code, inside in ((first, True), (last, True), (first - 1, None), (last + 1, None)):
            within = any(low <= code <= high for low, high in deduplicate.WITHOUT_SPACES)
            assert within or inside is None
            assert sketch(chr(code) * 5, config()).of_characters == within, hex(code)


@pytest.mark.parametrize("permutations", [16, 32, 128])
@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.95, 0.99, 0.999])
def test_any_threshold_goes_with_any_number_of_permutations(threshold: float, permutations: int) -> None:
    draw = random.Random(5)
    words = random_words(draw, 300)
    texts = [" ".join(words), " ".join(random_words(draw, 300)), " ".join(words) + " "]
    found = verdicts(texts, near_duplicate_threshold=threshold, permutations=permutations)
    assert found[0] is None
    assert found[2] == "exact"
    settings = config(near_duplicate_threshold=threshold, permutations=permutations)
    copies = keys(*stacked([texts[0], texts[0] + " once more"], settings), settings)
    assert copies.shape == (2, key_count(settings))


def stacked(texts: list[str], settings: DataConfig) -> tuple[Any, Any]:
    made = [sketch(text, settings) for text in texts]
    exact = np.stack([np.frombuffer(one.exact, dtype=np.uint8) for one in made])
    return exact, np.stack([one.signature for one in made if one.signature is not None])
