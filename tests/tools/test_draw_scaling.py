"""The simulator at the sizes that docs/plan.md shows: its rows of 16,384 GPUs are what is computed today."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoConfig

from dualtok.plan.hardware import DEVICES, GIB, Cluster
from dualtok.plan.scaling import COUNTS, scale
from dualtok.plan.shape import read_shape
from dualtok.plan.shapes import NAMED
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

MOST = COUNTS[-1]
CLUSTER = Cluster(DEVICES["h100"], 1, 8, DEVICES["h100"].memory, 2048 * GIB, 3200e9 / 8)


@pytest.mark.slow
def test_the_page_has_what_is_computed_for_the_most_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool: Any = importlib.import_module("draw_scaling")
    shown = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8").splitlines()
    found = {}
    for model, name in tool.MODELS.items():
        shape = read_shape(AutoConfig.for_model(**NAMED[name]))
        for family in tool.FAMILIES:
            found[model, family] = scale(shape, family, CLUSTER, length=4096, tokens=2**22, counts=(MOST,))
        best = max((point for family in tool.FAMILIES for point in found[model, family]), key=lambda point: point.mfu)
        assert tool.row(model, best) in shown
    tool.draw(found, list(tool.MODELS), tmp_path / "scaling.svg")
    text = (tmp_path / "scaling.svg").read_text()
    assert all(f"{model}, {title}" in text for model in tool.MODELS for title in tool.TITLES.values())
