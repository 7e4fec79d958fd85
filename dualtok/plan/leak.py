"""What a run is expected to gain and to give away, before it is trained: the law of the map.

The map is what ``tools/reproduce_paper.py --parts map`` measured; ``tools/paper/law.py`` fits the law to it and writes
``leak.json``. The law is a product of powers,

    y = exp(intercept) E^epochs N^documents P^parameters

of epochs E, private documents N and parameters P. One y is the power d' of the strongest attack on a plainly trained
model, for which an AUC is Phi(sqrt(d'^2 + floor^2) / sqrt(2)): with no leak at all the strongest of many attacks is a
little above .5. The other is what plain training takes off the held-out loss of the base model, in nats per token.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

FILE = Path(__file__).with_name("leak.json")
LEVEL = 0.9
"""Share of points left out of the fit that an interval is meant to hold."""
QUIET = 0.58
"""AUC of the strongest attack up to which a model counts as protected."""


@dataclass(frozen=True)
class Law:
    """One quantity as a product of powers."""

    intercept: float
    epochs: float
    documents: float
    parameters: float
    error: float
    """Root of the mean squared error of ln y, on points that were left out of the fit one by one."""

    def __call__(self, *, epochs: float, documents: float, parameters: float) -> float:
        """Return y."""
        return math.exp(
            self.intercept
            + self.epochs * math.log(epochs)
            + self.documents * math.log(documents)
            + self.parameters * math.log(parameters)
        )

    def interval(self, value: float) -> tuple[float, float]:
        """Return where :data:`LEVEL` of the errors leave a predicted value, if their logarithms are normal."""
        factor = math.exp(NormalDist().inv_cdf((1 + LEVEL) / 2) * self.error)
        return value / factor, value * factor


@dataclass(frozen=True)
class Map:
    """The laws, and where they were measured."""

    leak: Law
    """d' of the strongest attack on plain training."""
    gain: Law
    """Nats per token that plain training takes off the base model's held-out loss."""
    reference: Law
    """The same for the reference alone, whose documents are the auxiliary ones; of their number alone."""
    floor: float
    """d' of the strongest attack on models that saw no member: the mean."""
    held: float
    """AUC of the strongest attack on the dual loss from its reference's weights: the largest of all points."""
    ranges: dict[str, tuple[float, float]]
    """``documents``, ``epochs``, ``auxiliary`` and ``parameters``: least and most."""
    points: int


@dataclass(frozen=True)
class Span:
    """A prediction with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Expected:
    """What the map predicts of a run."""

    documents: int
    epochs: float
    auxiliary: int
    parameters: int
    auc: Span
    """Of the strongest attack on plain training for as many epochs."""
    gain: Span
    """What plain training takes off the base model's held-out loss. Unit: nats per token."""
    reference_gain: Span | None
    """What the reference alone takes off it; None without auxiliary documents."""
    outside: tuple[str, ...]
    """Names of :attr:`Map.ranges` that the run is outside of."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def auc_of(power: float, floor: float) -> float:
    """Return the expected AUC of the strongest attack of power d'."""
    return NormalDist().cdf(math.hypot(power, floor) / math.sqrt(2))


def power_of(auc: float, floor: float) -> float:
    """Return d' of the strongest attack, beyond what is there without a leak; 0 where nothing is."""
    seen = math.sqrt(2) * NormalDist().inv_cdf(auc)
    return math.sqrt(max(0.0, seen * abs(seen) - floor**2))


@cache
def load_map() -> Map:
    """Return the map as it was measured."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return Map(
        **{name: Law(**content[name]) for name in ("leak", "gain", "reference")},
        floor=content["floor"],
        held=content["held"],
        ranges={name: (low, high) for name, (low, high) in content["ranges"].items()},
        points=content["points"],
    )


def expect(known: Map, *, documents: int, epochs: float, auxiliary: int, parameters: int) -> Expected:
    """Predict what a run gains and gives away.

    Args:
        known: the map.
        documents: private ones.
        epochs: over them.
        auxiliary: documents that the reference has learned; 0 for none.
        parameters: of the whole model, though only adapters may be trained.
    """
    where = {"documents": documents, "epochs": epochs, "parameters": parameters}
    power = known.leak(**where)
    low, high = known.leak.interval(power)
    gain = known.gain(**where)
    reference = None
    if auxiliary:
        reference = known.reference(epochs=1, documents=auxiliary, parameters=parameters)
    measured = {**where, "auxiliary": auxiliary / documents}
    outside = [name for name, value in measured.items() if not _inside(value, known.ranges[name])]
    return Expected(
        documents,
        epochs,
        auxiliary,
        parameters,
        Span(*(auc_of(each, known.floor) for each in (power, low, high))),
        Span(gain, *known.gain.interval(gain)),
        None if reference is None else Span(reference, *known.reference.interval(reference)),
        tuple(outside),
    )


WORDS = {
    "documents": "private documents",
    "epochs": "epochs",
    "auxiliary": "auxiliary documents per private one",
    "parameters": "parameters",
}
"""Key of :attr:`Map.ranges` -> how it is called."""


def verdict(known: Map, said: Expected) -> str:
    """Return what follows from a prediction, in a few sentences."""
    sentences = []
    if said.auc.high <= QUIET:
        sentences.append(
            f"Plain training is expected to stay at {QUIET} or below by itself: the dual loss would give up most of "
            "its gain for little. Audit the plain model."
        )
    elif said.auc.low > QUIET:
        sentences.append("Attackers are expected to tell members of plain training: protect it, or read less often.")
    else:
        sentences.append("Plain training may give its members away or not: audit it before it is released.")
    if said.reference_gain is not None:
        lead = said.gain.value - said.reference_gain.value
        if lead <= 0:
            sentences.append(
                "The reference alone is expected to be as good as plain training: the private documents do not pay."
            )
        else:
            sentences.append(
                f"Beyond the reference alone, plain training is expected to gain {lead:.2f} nats. The dual loss ends "
                f"near its reference's loss; the strongest attack on it was at most {known.held:.2f}."
            )
    if said.outside:
        sentences.append(
            f"The run is outside of what was measured ({measured_ranges(known, said)}): trust the order of these "
            "figures at most."
        )
    return " ".join(sentences)


def measured_ranges(known: Map, said: Expected) -> str:
    """Return what the map has measured of all that a run is outside of."""
    return "; ".join(
        f"{WORDS[name]} {known.ranges[name][0]:,.6g} to {known.ranges[name][1]:,.6g}" for name in said.outside
    )


def _inside(value: float, known: tuple[float, float]) -> bool:
    """Return whether a value was measured, or is within a tenth of one that was."""
    return known[0] / 1.1 <= value <= known[1] * 1.1
