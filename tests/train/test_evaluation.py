"""The figures of an evaluation, worked out a second time from transformers' losses and scikit-learn's AUC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import ALONE
from dualtok.model.load import load_causal_lm
from dualtok.model.losses import TokenLossModel
from dualtok.train.evaluation import evaluate
from tests.support import save_model

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.data.stream.blocks import BlockStream


class RandomScores:
    """Reference losses drawn per shard: what they are does not matter, only that they are used as they should be."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def read(self, shard_stem: str, rows: np.ndarray) -> np.ndarray:
        lane = int(shard_stem.split("-")[1])
        values = np.random.default_rng(lane).random((2000, 64), dtype=np.float32)
        return 6.0 + self.shift + values[rows]


class Engine:
    """A model outside DeepSpeed."""

    layout = build_layout(ALONE)

    def __init__(self, model: TokenLossModel) -> None:
        self.model = model

    @torch.no_grad()
    def token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(batch)


def document_means(model: TokenLossModel, stream: BlockStream) -> tuple[dict[int, float], float]:
    """Return each document's mean of s(t), and the mean loss of all tokens, block by block and piece by piece."""
    calibrated: dict[int, list[float]] = {}
    losses: list[float] = []
    for batch, segments in stream.sequential(1):
        with torch.no_grad():
            loss = model(batch)[0]
        column = 0
        for piece in segments[0]:
            inside = slice(column, column + piece.length - 1)
            losses += loss[inside].tolist()
            calibrated.setdefault(piece.doc, []).extend((loss - batch["reference_loss"][0])[inside].tolist())
            column += piece.length
    return {doc: float(np.mean(values)) for doc, values in calibrated.items() if values}, float(np.mean(losses))


def test_loss_gap_and_ref_auc_are_what_they_say(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    model = TokenLossModel(load_causal_lm(save_model(tmp_path / "model", seed=1)).eval())
    members, validation = (
        DataFolder(small_corpus["dir"]).open(split, seed=0, losses=RandomScores(shift))
        for split, shift in (("auxiliary", 0.01), ("validation", 0.0))
    )
    found = evaluate(Engine(model), members, validation, blocks=10_000, batch_size=7, step=5)
    seen, member_loss = document_means(model, members)
    unseen, validation_loss = document_means(model, validation)
    assert found.step == 5
    assert found.member_loss == pytest.approx(member_loss, rel=1e-6)
    assert found.validation_loss == pytest.approx(validation_loss, rel=1e-6)
    assert found.gap == pytest.approx(validation_loss - member_loss, rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(validation_loss), rel=1e-6)
    # A member is a document that the model knows better than the reference does: low s.
    labels = [1] * len(seen) + [0] * len(unseen)
    auc = roc_auc_score(labels, [-value for value in [*seen.values(), *unseen.values()]])
    assert auc > 0.55, "the shift should show, or the direction could not"
    assert found.ref_auc == pytest.approx(auc, abs=1e-9)


def test_without_reference_losses_there_is_no_auc(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    model = TokenLossModel(load_causal_lm(save_model(tmp_path / "model", seed=1)).eval())
    streams = [DataFolder(small_corpus["dir"]).open(split) for split in ("auxiliary", "validation")]
    assert evaluate(Engine(model), *streams, blocks=8, batch_size=4, step=1).ref_auc is None
    assert load_manifest(small_corpus["dir"]).splits["auxiliary"].blocks > 8
