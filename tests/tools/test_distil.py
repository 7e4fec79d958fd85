"""Students of the reproduction: the loss against its closed form, each document's own teacher, and a whole run."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dualtok.data.folder import DataFolder
from dualtok.data.folds import fold_of
from dualtok.model.load import load_causal_lm
from tests.support import read_weights, save_model, write_run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tools.conftest import Module


@pytest.fixture
def distil(module: Module) -> Any:
    """Return the script as a module."""
    return module("paper.distil")


def test_the_gradient_is_the_difference_of_the_two_distributions(distil: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    taught = torch.rand(2, 5, generator=generator) < 0.6
    student.requires_grad_()
    loss = distil.soft_loss(student, teacher.log_softmax(-1), taught)
    loss.backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) * taught.unsqueeze(-1) / taught.sum()
    torch.testing.assert_close(student.grad, expected)
    p, q = (logits.detach().double().softmax(-1)[taught].numpy() for logits in (teacher, student))
    assert loss.item() == pytest.approx((p * np.log(p / q)).sum() / int(taught.sum()), rel=1e-5)
    assert distil.soft_loss(teacher, teacher.log_softmax(-1), taught).item() == pytest.approx(0, abs=1e-6)


def test_a_document_is_taught_by_the_model_that_left_out_its_fold(distil: Any, small_corpus: dict[str, Any]) -> None:
    data = DataFolder(small_corpus["dir"])
    blocks = distil.read_blocks(data, ["train"], teachers=3)
    rows = {ids.numpy().tobytes(): teacher for ids, teacher in zip(blocks.input_ids, blocks.teacher, strict=True)}
    seen = set()
    for batch, pieces in data.open("train").sequential(8):
        for ids, labels, row in zip(batch["input_ids"], batch["labels"], pieces, strict=True):
            start = 0
            for piece in row:
                here = slice(start, start + piece.length)
                fold = int(fold_of([piece.doc], 3)[0])
                expected = torch.where(labels[here] == -100, -1, fold)
                assert torch.equal(rows[ids.numpy().tobytes()][here], expected)
                start += piece.length
                seen.add(fold)
    assert seen == {0, 1, 2}
    alone = distil.read_blocks(data, ["reference", "auxiliary"], teachers=1)
    assert set(alone.teacher.unique().tolist()) == {-1, 0}
    assert len(alone.labels) == sum(data.entry(split).blocks for split in ("reference", "auxiliary"))


@pytest.mark.slow
def test_a_student_comes_near_its_teachers(
    distil: Any, small_corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = save_model(tmp_path / "start", 1, initializer_range=0.2)
    teachers = [tmp_path / f"fold-{fold}" for fold in (0, 1)]
    for folder, factor in zip(teachers, (1.4, 0.7), strict=True):
        shutil.copytree(start, folder)
        weights = {name: factor * tensor for name, tensor in read_weights(start).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = write_run(
        tmp_path / "run.yaml",
        small_corpus,
        objective="causal_lm",
        model={"path": str(start)},
        train={"learning_rate": 1e-2, "batch_size": 8, "epochs": 3, "precision": "fp32"},
    )
    folders = [str(folder) for folder in teachers]
    monkeypatch.setattr(sys, "argv", ["distil.py", str(run), str(tmp_path / "made"), "--teachers", *folders])
    distil.main()
    blocks = distil.read_blocks(DataFolder(small_corpus["dir"]), ["train"], teachers=2)
    expected = distil.expectations([load_causal_lm(folder).eval() for folder in teachers], blocks)

    def distance(folder: Path) -> float:
        with torch.no_grad():
            logits = load_causal_lm(folder)(input_ids=blocks.input_ids, position_ids=blocks.position_ids).logits
            return float(distil.soft_loss(logits, expected, blocks.teacher >= 0))

    assert distance(tmp_path / "made") < 0.7 * distance(start)
    assert (tmp_path / "made" / "tokenizer.json").is_file()
