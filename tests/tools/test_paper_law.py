"""The law of the map: fitted to figures that follow a known one, and read from audits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.plan import leak

if TYPE_CHECKING:
    from tests.tools.conftest import Module

FLOOR = 0.1


def attacked(power: float) -> float:
    """Return the AUC of the strongest attack of power d'."""
    return NormalDist().cdf(math.hypot(power, FLOOR) / math.sqrt(2))


def points(module: Module, noise: dict[str, float] | None = None) -> list[Any]:
    """Return rows that follow d' = 30 E / N**.75 and gain = .1 (E N)**.25 exactly, but for the noise of a point."""
    observed = module("paper.law").Observed
    rows = []
    for corpus in ("sotu", "wikipedia"):
        for documents in (100, 400, 1600):
            point = f"{corpus}-{documents}"
            factor = math.exp((noise or {}).get(point, 0.0))
            shared = {
                "corpus": corpus,
                "point": point,
                "documents": documents,
                "auxiliary": documents // 4,
                "parameters": 852_000,
                "over_reference": 0.0,
                "by_attacker": {},
            }
            alone = 0.02 * (documents / 4) ** 0.5
            seen = {"base": (0.0, 0.0), "reference, then auxiliary": (alone, 0.0), "dual, 3 epochs": (alone, 0.2)}
            for row, (gain, power) in seen.items():
                told = {"epochs": None, "perplexity": 300 * math.exp(-gain), "gain": gain, "auc": attacked(power)}
                rows.append(observed(row=row, **told, **shared))
            for epochs in (1.0, 3.0):
                gain, power = 0.1 * (epochs * documents) ** 0.25 * factor, 30 * epochs / documents**0.75 * factor
                told = {"perplexity": 300 * math.exp(-gain), "gain": gain, "auc": attacked(power)}
                rows.append(observed(row=f"plain, {epochs:g} epochs", epochs=epochs, **told, **shared))
    return rows


def test_a_law_is_found_again(module: Module) -> None:
    known = module("paper.law").make_map(points(module))
    assert (known.leak.epochs, known.leak.documents) == pytest.approx((1, -0.75))
    assert math.exp(known.leak.intercept) == pytest.approx(30)
    assert (known.gain.epochs, known.gain.documents, known.gain.error) == pytest.approx((0.25, 0.25, 0), abs=1e-9)
    assert (math.exp(known.reference.intercept), known.reference.documents) == pytest.approx((0.02, 0.5))
    assert known.leak.parameters == 0, "no term for what does not vary"
    assert known.floor == pytest.approx(FLOOR)
    assert known.ranges["documents"] == (100, 1600)
    assert known.points == 6


def test_errors_are_of_points_that_the_fit_has_not_seen(module: Module) -> None:
    """One point lies off by ln 2: left out, it is missed by all of that; the fit itself would come nearer."""
    law = module("paper.law")
    rows = [row for row in points(module, {"sotu-400": math.log(2)}) if row.epochs is not None]
    values, groups = law._gains(rows)
    _, errors = law.fit(values, groups)
    assert errors["sotu-400"] == pytest.approx([-math.log(2)] * 2)
    assert max(abs(error) for point, found in errors.items() for error in found if point != "sotu-400") < 0.4


def test_the_table_says_what_was_measured_and_how_far_the_law_is_off(module: Module) -> None:
    lines = list(module("paper.law").report(points(module)))
    assert "| sotu-100 | plain, 1 epochs | 218.7 | 0.316 | +0.000 | 0.750 |  |" in lines
    assert "| 400 | 0.60 (0.60 to 0.60) | 0.76 (0.76 to 0.76) | 0.45, 0.59 |" in lines
    assert "| d' | 1.00 | -0.75 | 0.00 | 0.000, 0.000 | 0.000, 0.000 |" in lines
    few = [row for row in points(module) if row.documents == 400]
    assert list(module("paper.law").report(few))[-1] == "Fewer than 3 points: no law is fitted."


def test_a_written_map_is_read_again(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = module("paper.law").make_map(points(module))
    file = tmp_path / "leak.json"
    module("paper.law").write_map(known, file)
    monkeypatch.setattr(leak, "FILE", file)
    assert leak.load_map.__wrapped__() == known
    assert known.held == pytest.approx(attacked(0.2))


def test_the_map_is_drawn(module: Module, tmp_path: Path) -> None:
    module("paper.law").draw(points(module), tmp_path / "map.svg")
    drawn = (tmp_path / "map.svg").read_text()
    assert "<svg" in drawn
    assert "dualtok" not in drawn


def test_rows_are_read_from_the_audits_of_the_points(module: Module, tmp_path: Path) -> None:
    """Those before shadow models, in an audit of their own, are held to the same base and reference."""
    scales = module("paper.scales")
    scale = replace(scales.SCALES["smoke"], points=scales.SCALES["smoke"].points[:1])
    cell = module("paper.grid").cell_of(scale, scale.points[0], tmp_path)

    def audited(part: str, models: dict[str, tuple[float, float]]) -> None:
        folder = cell.folder / f"audit-{part}" / "audit"
        folder.mkdir(parents=True)
        said = [
            {
                "name": name,
                "perplexity_non_members": perplexity,
                "strongest": {"auc_two_sided": {"value": auc}},
                "attacks": [
                    {"name": "ref", "auc": {"value": 0.9}},
                    {"name": "ref@quarter", "auc": {"value": 0.3}},
                    {"name": "lira@quarter", "auc": {"value": 0.6}},
                ],
            }
            for name, (perplexity, auc) in models.items()
        ]
        (folder / "audit.json").write_text(json.dumps({"models": said}))

    audited("map", {"base": (100, 0.5), "reference, then auxiliary": (80, 0.52), "plain, 3 epochs": (50, 0.8)})
    audited("map-lira", {"plain, 3 epochs, by 2 shadows": (50, 0.85)})
    rows = {row.row: row for row in module("paper.law").observe([cell])}
    plain = rows["plain, 3 epochs"]
    assert (plain.gain, plain.over_reference) == pytest.approx((math.log(2), math.log(80 / 50)))
    assert plain.by_attacker == pytest.approx({"fortieth": 0.9, "quarter": 0.7}), "two-sided"
    assert (plain.epochs, plain.documents, plain.auxiliary) == (3, 40, 10)
    shadows = rows["plain, 3 epochs, by 2 shadows"]
    assert (shadows.epochs, shadows.auc, shadows.gain) == (None, 0.85, plain.gain)
    assert module("paper.figures").collect([cell]) == {}, "points are no cells of the paper's tables"


def test_parameters_are_those_of_the_model(module: Module, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    scale = module("paper.scales").SCALES["smoke"]
    cell = module("paper.grid").cell_of(scale, scale.points[0], tmp_path)
    config = AutoConfig.for_model(**cell.scale.model["config"], vocab_size=scale.vocabulary)
    model = AutoModelForCausalLM.from_config(config)
    assert module("paper.law").parameters(cell) == sum(weights.numel() for weights in model.parameters())
