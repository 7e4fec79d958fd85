"""How far a model may go from its reference: the expected attack, the largest weight, the weights between."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dualtok.audit.statistics.metrics import roc_auc
from dualtok.errors import ConfigError
from dualtok.model.folder.interpolate import write_interpolation
from dualtok.reference.interpolation import expected_auc, largest_weight
from tests.support import save_model

if TYPE_CHECKING:
    from pathlib import Path


def test_the_expected_auc_is_what_ref_reaches() -> None:
    draw = np.random.default_rng(0)
    n, memorized = 20_000, 0.02
    sides = []
    for learned in (memorized, 0.0):
        difficulty = draw.normal(5.0, 0.5, n)
        reference = difficulty + draw.normal(0, 0.05, n)
        surrogate = difficulty + draw.normal(0, 0.05, n)
        sides.append((reference - 0.1 - learned, reference, surrogate))
    ref_attack = roc_auc(*(surrogate - model for model, _, surrogate in sides))
    assert expected_auc(sides[0], sides[1]) == pytest.approx(ref_attack, abs=0.01)
    assert ref_attack > 0.55


def test_the_upper_end_holds_for_other_documents() -> None:
    """With so few documents the gap that is seen is as often too small as too large; its upper end hardly ever is."""
    draw = np.random.default_rng(2)
    gap, spread, rounds = 0.01, 0.05, 400
    auc = 0.5 + 0.5 * math.erf(gap / (np.sqrt(2) * spread) / np.sqrt(2))
    missed = {0.5: 0, 0.95: 0}
    for _ in range(rounds):
        sides = []
        for n, learned in ((200, gap), (50, 0.0)):
            base = draw.normal(5.0, 0.5, n)
            model = base - learned + draw.normal(0, 0.03, n)
            sides.append((model, base, model - draw.normal(0, spread, n)))
        for confidence in missed:
            missed[confidence] += expected_auc(sides[0], sides[1], confidence) < auc
    assert 0.4 < missed[0.5] / rounds < 0.6
    assert 0.01 < missed[0.95] / rounds < 0.1


def test_chance_differences_of_the_classes_drop_out() -> None:
    """Members that are easier by themselves give nothing away, in the reference or near it."""
    draw = np.random.default_rng(1)
    easy, hard = draw.normal(4.0, 0.5, 50), draw.normal(5.0, 0.5, 50)
    spread = [draw.normal(0, 0.05, 50) for _ in range(2)]
    sides = [(loss, loss, loss + noise) for loss, noise in zip((easy, hard), spread, strict=True)]
    assert expected_auc(sides[0], sides[1], 0.95) == 0.5


def test_the_largest_weight_is_where_the_limit_is_reached() -> None:
    tried: list[float] = []

    def auc_at(w: float) -> float:
        tried.append(w)
        return 0.5 + 0.3 * w**1.5

    assert largest_weight(auc_at, 0.53) == pytest.approx((0.03 / 0.3) ** (1 / 1.5), abs=0.005)
    assert len(tried) <= 10
    assert 0.0 not in tried
    assert largest_weight(lambda w: 0.5 + 0.01 * w, 0.53) == 1.0


def test_weights_between_two_models(tmp_path: Path) -> None:
    start, end = save_model(tmp_path / "start", seed=1), save_model(tmp_path / "end", seed=2)
    made = write_interpolation(start, end, 0.25, tmp_path / "made")
    ours, near, far = (load_file(folder / "model.safetensors") for folder in (made, start, end))
    assert ours.keys() == far.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, 0.75 * near[name] + 0.25 * far[name])
    assert (made / "config.json").read_text() == (end / "config.json").read_text()
    assert not list(tmp_path.glob(".*"))
    write_interpolation(start, end, 1.0, made)  # what was there is replaced
    assert torch.equal(
        load_file(made / "model.safetensors")[
            "lm_head.weight" if "lm_head.weight" in far else "model.embed_tokens.weight"
        ],
        far["lm_head.weight" if "lm_head.weight" in far else "model.embed_tokens.weight"],
    )


def test_models_of_other_shapes_are_refused(tmp_path: Path) -> None:
    start, wide = save_model(tmp_path / "start", seed=1), save_model(tmp_path / "wide", seed=1, intermediate_size=32)
    deep = save_model(tmp_path / "deep", seed=1, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="has shapes"):
        write_interpolation(start, wide, 0.5, tmp_path / "made")
    with pytest.raises(ConfigError, match=r"layers\.2.* is a weight of one of them alone"):
        write_interpolation(start, deep, 0.5, tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"start", "wide", "deep"}
