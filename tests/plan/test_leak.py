"""What the map predicts of a run: laws worked out by hand, intervals, verdicts, and the map that is shipped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import NormalDist

import pytest

from dualtok.plan.leak import Expected, Law, Map, auc_of, expect, load_map, power_of, verdict

RANGES = {"documents": (100.0, 1600.0), "epochs": (1.0, 10.0), "auxiliary": (0.25, 1.0), "parameters": (1e6, 2e7)}
KNOWN = Map(
    leak=Law(intercept=math.log(40), epochs=1.0, documents=-0.5, parameters=0.0, error=0.2),
    gain=Law(intercept=math.log(0.1), epochs=0.5, documents=0.25, parameters=0.0, error=0.1),
    reference=Law(intercept=math.log(0.02), epochs=0.0, documents=0.5, parameters=0.0, error=0.1),
    floor=0.1,
    held=0.56,
    ranges=RANGES,
    points=9,
)


def of(documents: int = 400, epochs: float = 1, auxiliary: int = 100) -> Expected:
    return expect(KNOWN, documents=documents, epochs=epochs, auxiliary=auxiliary, parameters=2_000_000)


def test_a_prediction_is_the_product_of_powers() -> None:
    said = of(epochs=4)
    power = 40 * 4 * 400**-0.5  # 8
    assert said.auc.value == pytest.approx(NormalDist().cdf(math.sqrt(power**2 + 0.1**2) / math.sqrt(2)))
    assert said.gain.value == pytest.approx(0.1 * 2 * 400**0.25)
    assert said.reference_gain is not None
    assert said.reference_gain.value == pytest.approx(0.02 * 10)


def test_an_interval_is_of_normal_errors_of_the_logarithm() -> None:
    factor = math.exp(1.6448536 * 0.1)
    assert (of().gain.low, of().gain.high) == pytest.approx((of().gain.value / factor, of().gain.value * factor))
    assert of().auc.low < of().auc.value < of().auc.high


def test_auc_and_power_are_each_others_inverse() -> None:
    for power in (0.0, 0.3, 2.0):
        assert power_of(auc_of(power, 0.15), 0.15) == pytest.approx(power, abs=1e-6)
    assert auc_of(0, 0) == 0.5
    assert power_of(0.51, 0.15) == 0, "less than the strongest of many attacks reaches without a leak"


def test_an_auc_below_one_half_is_no_leak() -> None:
    assert power_of(0.3, 0.0) == 0


def test_without_auxiliary_documents_nothing_is_said_of_a_reference() -> None:
    said = of(auxiliary=0)
    assert said.reference_gain is None
    assert said.outside == ("auxiliary",)
    assert "reference alone" not in verdict(KNOWN, said)


@pytest.mark.parametrize(
    ("changes", "outside"),
    [
        ({}, ()),
        ({"documents": 1700, "auxiliary": 425}, ()),
        ({"documents": 3200, "auxiliary": 800}, ("documents",)),
        ({"documents": 80, "auxiliary": 100, "epochs": 20}, ("documents", "epochs", "auxiliary")),
    ],
)
def test_a_run_outside_of_the_measured_ranges_is_told(changes: dict[str, int], outside: tuple[str, ...]) -> None:
    said = of(**changes)
    assert said.outside == outside
    assert ("outside of what was measured" in verdict(KNOWN, said)) == bool(outside)


def test_the_verdict_follows_the_interval() -> None:
    quiet = replace(KNOWN, leak=replace(KNOWN.leak, intercept=math.log(0.2)))
    for known, words in ((KNOWN, "Attackers are expected"), (quiet, "would give up most of its gain for little")):
        assert words in verdict(known, expect(known, documents=400, epochs=1, auxiliary=100, parameters=2_000_000))
    between = replace(KNOWN, leak=replace(KNOWN.leak, intercept=math.log(0.25 * 20)))
    said = expect(between, documents=400, epochs=1, auxiliary=100, parameters=2_000_000)
    assert said.auc.value < 0.58 < said.auc.high
    assert "or not: audit it" in verdict(between, said)


def test_private_documents_that_add_nothing_do_not_pay() -> None:
    rich = replace(KNOWN, reference=replace(KNOWN.reference, intercept=math.log(0.2)))
    said = expect(rich, documents=400, epochs=1, auxiliary=400, parameters=2_000_000)
    assert "the private documents do not pay" in verdict(rich, said)
    assert "expected to gain 0.25 nats" in verdict(KNOWN, of())


def test_a_prediction_is_plain_values_for_json() -> None:
    content = json.loads(json.dumps(of().as_dict()))
    assert content["auc"]["low"] == of().auc.low
    assert content["outside"] == []


def test_the_map_that_is_shipped_says_what_was_seen() -> None:
    known = load_map()
    assert known.leak.epochs > 0
    assert known.leak.documents < 0
    assert known.gain.epochs > 0
    assert known.reference.documents > 0
    assert known.points >= 3
    often, once = (expect(known, documents=400, epochs=count, auxiliary=100, parameters=852_000) for count in (10, 1))
    assert often.auc.value > once.auc.value
    assert often.outside == ()
