"""A small prepared corpus of real text, made once per test process."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.skips import pytest_runtest_makereport  # noqa: F401  # a hook
from tests.support import write_small_corpus

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the ``data`` section of 300 prepared SOTU passages: blocks of 64 tokens, 512 ids, 8 lanes."""
    return write_small_corpus(tmp_path_factory.mktemp("corpus"))
