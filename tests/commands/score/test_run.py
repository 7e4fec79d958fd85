"""Scoring: the same losses on any number of ranks and under ZeRO-3, continued where it stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dualtok.data.folder import DataFolder
from dualtok.data.folds import fold_of
from dualtok.data.manifest import load_manifest
from tests.support import (
    ROOT,
    command,
    dualtok,
    environment,
    error_line,
    own_copy,
    partitioned_json,
    save_model,
    succeed,
    write_run,
)
from tests.warm import fork_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference") / "model", seed=1)


def read_scores(data_dir: str, folder: str = "*") -> dict[str, np.ndarray]:
    losses = {}
    for file in sorted(Path(data_dir).glob(f"scores/{folder}/*/*.arrow")):
        with pa.memory_map(str(file)) as source:
            column = pa.ipc.open_file(source).read_all().column("loss").combine_chunks()
        losses[f"{file.parent.name}/{file.stem}"] = column.flatten().to_numpy().reshape(len(column), -1)
    return losses


@torch.no_grad()
def expected_losses(data_dir: str, model: Path) -> dict[str, np.ndarray]:
    """Return transformers' own losses of every shard; with a cache it would ignore document boundaries."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(model).eval()
    losses = {}
    for split in ("train", "validation"):
        stream = DataFolder(data_dir).open(split)
        for shard in load_manifest(data_dir).splits[split].shards:
            batch = stream.read_rows(shard.file, np.arange(shard.rows))
            logits = causal_lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
            losses[f"{split}/{shard.stem}"] = loss.numpy()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharded"), [(0, False), (2, False), (3, False), (2, True)])
def test_any_number_of_ranks_gives_transformers_losses(
    small_corpus: dict[str, Any], tmp_path: Path, model: Path, ranks: int, sharded: bool
) -> None:
    data = own_copy(small_corpus, tmp_path / "data")
    reference = {"model": str(model), "batch_size": 5, **({"deepspeed": partitioned_json(tmp_path)} if sharded else {})}
    run = write_run(tmp_path / "run.yaml", data, reference=reference)
    succeed(dualtok("score", run, ranks=ranks))
    found, expected = read_scores(data["dir"]), expected_losses(data["dir"], model)
    assert found.keys() == expected.keys()
    for name, losses in expected.items():
        np.testing.assert_allclose(found[name], losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_altered_scores_are_computed_again(small_corpus: dict[str, Any], tmp_path: Path, model: Path) -> None:
    data = own_copy(small_corpus, tmp_path / "data")
    run = write_run(tmp_path / "run.yaml", data, reference={"model": str(model), "splits": ["validation"]})
    succeed(dualtok("score", run))
    whole = read_scores(data["dir"])
    file = sorted(Path(data["dir"]).glob("scores/*/*/*.arrow"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "(1 now" in succeed(dualtok("score", run))
    again = read_scores(data["dir"])
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_scoring_goes_on_where_it_stopped(small_corpus: dict[str, Any], tmp_path: Path, model: Path) -> None:
    data = own_copy(small_corpus, tmp_path / "data")
    run = write_run(tmp_path / "run.yaml", data, reference={"model": str(model)})
    succeed(dualtok("score", run))
    whole = read_scores(data["dir"])
    files = sorted(Path(data["dir"]).glob("scores/*/*/*.arrow"))
    (index,) = Path(data["dir"]).glob("scores/*/scores.json")
    index.unlink()  # as if the job had been killed before the end:
    files[0].unlink()  # one shard not begun,
    torn = files[1].read_bytes()
    files[1].write_bytes(torn[: len(torn) // 2])  # one torn by another program; our own writing is atomic
    kept = {file: file.stat().st_mtime_ns for file in files[2:]}
    assert f"{len(files)} shards scored (2 now" in succeed(dualtok("score", run))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "a finished shard was scored again"
    again = read_scores(data["dir"])
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert f"{len(files)} shards scored (0 now" in succeed(dualtok("score", run))


@pytest.mark.slow
def test_scoring_killed_at_random_moments_gives_the_same_bytes(
    small_corpus: dict[str, Any], tmp_path: Path, model: Path
) -> None:
    draw = random.Random(0)
    whole, broken = (own_copy(small_corpus, tmp_path / name) for name in ("whole", "broken"))
    reference = {"model": str(model), "batch_size": 1}
    succeed(dualtok("score", write_run(tmp_path / "whole.yaml", whole, reference=reference)))
    run = write_run(tmp_path / "broken.yaml", broken, reference=reference)
    shards = len(list(Path(whole["dir"]).glob("scores/*/*/*.arrow")))
    done = 0
    for _ in range(2):
        process = subprocess.Popen(
            command("dualtok", "score", run),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wanted, deadline = done + draw.randrange(1, shards // 3), time.monotonic() + 240
        while (done := len(list(Path(broken["dir"]).glob("scores/*/*/shard*.arrow")))) < wanted:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(fork_of(process.pid), signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not list(Path(broken["dir"]).glob("scores/*/scores.json"))
    (folder,) = Path(broken["dir"]).glob("scores/*/train")
    (folder / ".shard-00000-00000.arrow.1.tmp").write_bytes(b"left by a rank that was killed while it wrote")
    done = len(list(Path(broken["dir"]).glob("scores/*/*/shard*.arrow")))
    assert f"{shards} shards scored ({shards - done} now" in succeed(dualtok("score", run))

    def contents(data: dict[str, Any]) -> dict[str, bytes]:
        files = (path for path in (Path(data["dir"]) / "scores").rglob("*") if path.is_file())
        return {str(path.relative_to(data["dir"])): path.read_bytes() for path in files}

    assert contents(broken) == contents(whole)


def test_a_reference_that_does_not_fit_is_refused(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    small = save_model(tmp_path / "small", seed=0, max_position_embeddings=32)
    run = write_run(tmp_path / "run.yaml", {"dir": small_corpus["dir"]}, reference={"model": str(small)})
    assert "max_position_embeddings is 32" in error_line(dualtok("score", run))
    line = error_line(dualtok("score", run, "reference.model=/absent/model"))
    assert "/absent/model: neither a model folder nor a hub model" in line


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_each_document_is_judged_by_the_model_that_left_it_out(
    small_corpus: dict[str, Any], tmp_path: Path, model: Path, ranks: int
) -> None:
    data = own_copy(small_corpus, tmp_path / "data")
    models = [model, save_model(tmp_path / "other", seed=2)]
    run = write_run(tmp_path / "run.yaml", data, reference={"folds": [str(model) for model in models]})
    output = succeed(dualtok("score", run, ranks=ranks))
    found = read_scores(data["dir"], Path(output.strip().rsplit(" in ", maxsplit=1)[1]).name)
    expected = [expected_losses(data["dir"], model) for model in models]
    assert found.keys() == expected[0].keys()
    taken = set()
    for name, losses in found.items():
        split, stem = name.split("/")
        pieces = DataFolder(data["dir"]).open(split).pieces(f"{stem}.arrow", np.arange(len(losses)))
        for row, in_row in enumerate(pieces):
            column = 0
            for piece in in_row:
                fold = int(fold_of([piece.doc], 2)[0])
                taken.add(fold)
                here = slice(column, column + piece.length)
                np.testing.assert_allclose(losses[row, here], expected[fold][name][row, here], rtol=1e-5, atol=1e-5)
                column += piece.length
    assert taken == {0, 1}
    shards = len(found)
    assert f"{shards} shards scored (0 now" in succeed(dualtok("score", run))
