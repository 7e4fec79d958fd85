"""A prepared folder with duplicates among its documents, and an S3 server, each made once per test process."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest

from dualtok.data.prepare import staged
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from tests import warm
from tests.data.prepare.preparing import CHUNK, PASSAGES, settings_of
from tests.data.remote.servers import CREDENTIALS, s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="package", autouse=True)
def _workers_are_forked() -> Iterator[None]:
    with warm.spawning():
        yield


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


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Return the URL of moto's S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the credentials that moto takes, and keep the host's own out."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat failed attempts at once, nearly."""
    monkeypatch.setattr("dualtok.data.remote.storage.FIRST_PAUSE", 0.01)
