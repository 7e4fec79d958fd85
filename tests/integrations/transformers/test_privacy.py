"""The callback's figures are those of its documents, whatever the Trainer trains with."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from dualtok.audit.statistics.metrics import roc_auc
from dualtok.errors import DataError
from dualtok.integrations.transformers import DualCollator, DualTrainer, PrivacyCallback, score_dataset
from tests.integrations.transformers.support import arguments, documents, reference_losses, tiny_llama
from tests.support import ROOT, command, environment

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    folder = tmp_path_factory.mktemp("scores")
    scored = score_dataset(tiny_llama(1), documents(31), cache_dir=folder)
    return scored.select(range(14)), scored.select(range(14, 31))


def figures(model: Any, members: Dataset, others: Dataset) -> dict[str, float]:
    """Return the scalars, document by document and without dualtok's forward pass."""
    sums = []
    with torch.no_grad():
        for data in (members, others):
            rows = []
            for row in data:
                kept = torch.tensor(row["labels"][1:]) != -100
                loss = reference_losses(model, row["input_ids"])[kept]
                rows.append((float(loss.sum()), float(torch.tensor(row["reference_loss"][1:])[kept].sum()), len(loss)))
            sums.append(torch.tensor(rows, dtype=torch.float64))
    member_loss, loss = (float(s[:, 0].sum() / s[:, 2].sum()) for s in sums)
    auc = roc_auc(*(-((s[:, 0] - s[:, 1]) / s[:, 2]).numpy() for s in sums))
    return {
        "evaluation/validation_loss": loss,
        "evaluation/member_loss": member_loss,
        "evaluation/member_gap": loss - member_loss,
        "evaluation/ref_auc": float(auc),
    }


@pytest.mark.parametrize("kind", [DualTrainer, Trainer])
def test_the_figures_are_those_of_the_documents(
    both: tuple[Dataset, Dataset], tmp_path: Path, kind: type[Trainer]
) -> None:
    members, others = both
    settings = arguments(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=3, learning_rate=1e-2, save_strategy="best",
        metric_for_best_model="ref_auc", greater_is_better=False,
    )  # fmt: skip
    data = {"train_dataset": members, "eval_dataset": others.select(range(4))}
    trainer = kind(tiny_llama(2), settings, DualCollator(), **data)
    trainer.add_callback(PrivacyCallback(trainer, members, others, batch_size=4))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "evaluation/member_gap" in line]
    assert [line["step"] for line in lines] == [3, 6]
    known = figures(trainer.model.eval(), members, others)
    for name, value in known.items():
        assert lines[-1][name] == pytest.approx(value, rel=1e-5), name
    assert lines[-1]["evaluation/member_gap"] > lines[0]["evaluation/member_gap"]
    assert trainer.state.best_metric == min(line["evaluation/ref_auc"] for line in lines)
    assert trainer.model.training is False


def test_without_reference_losses_there_is_the_gap_alone(both: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    members, others = (data.remove_columns("reference_loss") for data in both)
    trainer = Trainer(tiny_llama(2), arguments(tmp_path), DualCollator(), eval_dataset=others)
    trainer.add_callback(PrivacyCallback(trainer, members, others))
    metrics = trainer.evaluate()
    assert "eval_ref_auc" not in metrics
    assert metrics["eval_member_gap"] == pytest.approx(figures(trainer.model, *both)["evaluation/member_gap"], rel=1e-4)
    with pytest.raises(DataError, match="members: no documents"):
        PrivacyCallback(trainer, [], others)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, {"zero_optimization": {"stage": 3}}])
def test_ranks_share_the_documents(
    both: tuple[Dataset, Dataset], tmp_path: Path, deepspeed: dict[str, Any] | None
) -> None:
    """14 and 17 documents, 8 in a batch: on two ranks the last passes have other sizes, or none."""
    members, others = both
    model = tiny_llama(2)
    model.save_pretrained(tmp_path / "start")
    everyone = Dataset.from_list([*members, *others])
    everyone.save_to_disk(str(tmp_path / "documents"))
    settings: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    if deepspeed is not None:
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        settings["deepspeed"] = {**deepspeed, **sizes}
    blocks, start = str(tmp_path / "documents"), str(tmp_path / "start")
    cell = {"name": "cell", "kind": "trainer", "start": start, "blocks": blocks, "privacy": blocks}
    (tmp_path / "cells.json").write_text(json.dumps([{**cell, "arguments": settings}]))
    done = subprocess.run(
        command("tests.integrations.transformers.train_cells", tmp_path / "cells.json", ranks=2),
        env=environment(LOCAL_SIZE="2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    log = json.loads((tmp_path / "cell.json").read_text())
    line = next(line for line in log if "evaluation/ref_auc" in line)
    half = len(everyone) // 2
    known = figures(model, everyone.select(range(half)), everyone.select(range(half, len(everyone))))
    for name, value in known.items():
        assert line[name] == pytest.approx(value, rel=1e-5), name
