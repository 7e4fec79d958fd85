"""A prepared folder is opened once and handed on: no file of it is read twice in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.load import load_run
from dualtok.data.folder import DataFolder
from dualtok.errors import DataError
from tests.support import environment, write_run

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.run import RunConfig

READ = """
import json, sys
from collections import Counter
from pathlib import Path

opened, folder = Counter(), Path(sys.argv[1]).resolve()

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[1] != "w":
        path = Path(arguments[0])
        if path.is_relative_to(folder):
            opened[str(path.relative_to(folder))] += 1

from dualtok.config.load import load_run
from dualtok.data.folder import DataFolder
from dualtok.data.mixed import load_sources
from dualtok.commands.train import open_streams
from dualtok.distributed.ranks import ALONE
from dualtok.model.check import check_model  # what a verb imports is not what it reads
from dualtok.reference.fingerprint import blocks_digest

run = load_run(sys.argv[2])
sys.addaudithook(note)
sources = load_sources(run.data, "train")
streams = open_streams(run, sources, ("train", "validation"), ALONE)
data = sources[0].folder
blocks_digest(data.manifest)
data.entry("held_out"), data.tokenizer, data.tokenizer
for split in ("held_out", "validation"):
    list(data.documents(split)), list(data.documents(split))
next(streams[0].batches(start_sample=0, global_micro_batch=2, rank=0, world_size=1, workers=0))
print(json.dumps(opened))
"""


@pytest.fixture
def run(small_corpus: dict[str, Any], tmp_path: Path) -> RunConfig:
    train = {"learning_rate": 1e-3, "batch_size": 2, "steps": 2}
    file = write_run(tmp_path / "run.yaml", small_corpus, objective="causal_lm", train=train)
    return load_run(file)


def test_what_a_run_opens_it_reads_once(run: RunConfig, small_corpus: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, small_corpus["dir"], str(tmp_path / "run.yaml")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])
    assert opened["manifest.json"] == 1
    # transformers itself reads the tokenizer's files more than once when it loads them.
    again = {name: count for name, count in opened.items() if count > 1 and not name.startswith("tokenizer/")}
    assert again == {}
    assert any(name.startswith("held_out") for name in opened)


def test_parts_are_kept_once_they_are_read(run: RunConfig) -> None:
    data = DataFolder.of_run(run.data)
    assert data.tokenizer is data.tokenizer
    assert str(data) == run.data.dir


def test_a_folder_that_is_not_prepared_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        DataFolder(tmp_path)
