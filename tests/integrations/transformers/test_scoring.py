"""score_dataset: the reference's loss on each token, cached, and refused where model and data do not fit."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
import torch
from datasets import Dataset, load_from_disk

from dualtok.errors import ConfigError, DataError
from dualtok.integrations.transformers import score_dataset, scoring
from tests.integrations.transformers.support import documents, reference_losses, tiny_llama
from tests.support import ROOT, command, environment

if TYPE_CHECKING:
    from pathlib import Path


def test_each_token_has_the_loss_that_the_models_own_logits_give_it(tmp_path: Path) -> None:
    model, data = tiny_llama(1), documents()
    scored = score_dataset(model, data, cache_dir=tmp_path, batch_size=5)
    assert scored.column_names == ["input_ids", "labels", "reference_loss"]
    assert scored["labels"][:] == data["labels"][:]
    for row in scored:
        assert row["reference_loss"][0] == 0.0
        known = reference_losses(model, row["input_ids"])
        torch.testing.assert_close(torch.tensor(row["reference_loss"][1:]), known, rtol=1e-5, atol=1e-5)


def test_masked_tokens_are_not_there(tmp_path: Path) -> None:
    model, row = tiny_llama(1), [5, 6, 7, 8]
    padded = Dataset.from_dict(
        {"input_ids": [[0, 0, *row], [*row, 0, 0]], "attention_mask": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]}
    )
    left, right = score_dataset(model, padded, cache_dir=tmp_path)["reference_loss"]
    known = [0.0, *reference_losses(model, row).tolist()]
    assert left == pytest.approx([0, 0, *known], rel=1e-5)
    assert right == pytest.approx([*known, 0, 0], rel=1e-5)


def test_the_cache_knows_weights_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    once = scoring._score_part
    monkeypatch.setattr(scoring, "_score_part", lambda *given: (scores.append(given[2].name), once(*given)))
    monkeypatch.setattr(scoring, "PART_ROWS", 20)
    model, data = tiny_llama(1), documents(48)
    first = score_dataset(model, data, cache_dir=tmp_path)["reference_loss"][:]
    assert len(scores) == 3
    again = score_dataset(tiny_llama(1), documents(48).add_column("text", ["x"] * 48), cache_dir=tmp_path)
    assert again["reference_loss"][:] == first
    assert len(scores) == 3, "the same weights and tokens were scored again"
    score_dataset(tiny_llama(2), data, cache_dir=tmp_path)
    assert len(scores) == 6, "other weights got the cached losses"
    changed = data.map(
        lambda row, index: {"input_ids": [9, *row["input_ids"][1:]] if index == 30 else row["input_ids"]},
        with_indices=True,
    )
    score_dataset(model, changed, cache_dir=tmp_path)
    assert len(scores) == 7, "only the part that was changed needs a pass"
    (tmp_path / scores[0]).unlink()  # as if a job had been interrupted
    assert score_dataset(model, data, cache_dir=tmp_path)["reference_loss"][:] == first
    assert len(scores) == 8
    shuffled = data.shuffle(seed=0)
    by_row = {tuple(row): losses for row, losses in zip(data["input_ids"], first, strict=True)}
    for row in score_dataset(model, shuffled, cache_dir=tmp_path):
        assert row["reference_loss"] == pytest.approx(by_row[tuple(row["input_ids"])], abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"input_ids": [[1, 2], [3, 400]]}, "row 1: token 400 is not among the reference's 128"),
        ({"input_ids": [[1, 2], []]}, "row 1: no tokens"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "row 0: 2 input_ids and 1 values of attention_mask"),
        ({"text": ["a"]}, "no column input_ids"),
        ({"input_ids": [[1, 2]], "reference_loss": [[0.0, 1.0]]}, "has a column reference_loss already"),
        ({"input_ids": []}, "no rows"),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path: Path, rows: dict[str, list], words: str) -> None:
    with pytest.raises(DataError, match=words):
        score_dataset(tiny_llama(1), Dataset.from_dict(rows), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == [], "something half-written was left"


def test_broken_weights_are_told_by_the_row(tmp_path: Path) -> None:
    model = tiny_llama(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.nan
    with pytest.raises(DataError, match="row 0: the reference gives a loss that is not finite"):
        score_dataset(model, Dataset.from_dict({"input_ids": [[1, 77, 3]]}), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_none_and_a_stream_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no causal language model"):
        score_dataset(tiny_llama(1).model, documents(), cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"needs a datasets\.Dataset"):
        score_dataset(tiny_llama(1), documents().to_iterable_dataset(), cache_dir=tmp_path)


WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from datasets import load_from_disk
from dualtok.integrations.transformers import score_dataset, scoring
from transformers import AutoModelForCausalLM
scoring.PART_ROWS = 10
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(folder / "model")
scored = score_dataset(model, load_from_disk(folder / "data"), cache_dir=folder / "cache")
scored.save_to_disk(folder / f"scored-{dist.get_rank()}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_share_the_rows_and_have_the_same_losses(tmp_path: Path) -> None:
    model, data = tiny_llama(1), documents()
    model.save_pretrained(tmp_path / "model")
    data.save_to_disk(tmp_path / "data")
    (tmp_path / "score_worker.py").write_text(WORKER)
    job = command("score_worker", tmp_path, ranks=2, afresh=True)
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        job, env=environment(PYTHONPATH=path), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    known = score_dataset(model, data, cache_dir=tmp_path / "alone")["reference_loss"][:]
    for rank in (0, 1):
        found = load_from_disk(str(tmp_path / f"scored-{rank}"))["reference_loss"][:]
        assert json.dumps(found) == json.dumps(load_from_disk(str(tmp_path / "scored-0"))["reference_loss"][:])
        for one, other in zip(found, known, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 5
