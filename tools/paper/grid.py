"""The map: what plain training gains and gives away, by private documents, reads, auxiliary documents and model.

A point is a cell of its own: one base, one split, and the methods on it. All are attacked by attackers who have a
fortieth, a quarter and all of as many documents as the private ones. ``law.py`` fits the law to what is measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from paper.cell import Cell
from paper.models import (
    ALL_AUXILIARY,
    attackers,
    cross_fitted,
    interpolated,
    judged_by_shadows,
    private_model,
    reference_model,
    reference_of_all,
    scales_from_all,
    score_of_all,
)
from paper.scales import Attacker, llama

from dualtok.config.reference import InterpolateConfig

if TYPE_CHECKING:
    from pathlib import Path

    from paper.cell import Run
    from paper.scales import Point, Scale

DOCUMENTS = {"sotu": 10_003, "wikipedia": 8_060}
"""Of the bundled corpora."""
EPOCHS = (1, 3, 10)
ATTACKERS = {"fortieth": Attacker(1 / 40, 3), "quarter": Attacker(1 / 4, 3), "as_many": Attacker(1, 3)}
"""By name: documents over the private ones, and how often they are read."""
LONGEST = 5_000
"""Documents read beyond which a point has no runs of ten epochs."""


def cell_of(scale: Scale, point: Point, root: Path) -> Cell:
    """Return the cell of a point.

    Raises:
        ValueError: the corpus has too few documents.
    """
    judged = max(scale.judged, min(point.documents, 2 * scale.judged))
    half = max(2, round(point.auxiliary * point.documents / 2))
    counts = {
        "train": point.documents,
        "reference": half,
        "auxiliary": half,
        "validation": max(scale.judged // 8, min(half, scale.judged)),
        "attack_reference": point.documents,
        "held_out": judged,
    }
    if sum(counts.values()) > DOCUMENTS[point.corpus]:
        raise ValueError(f"{point.corpus}: has {DOCUMENTS[point.corpus]} documents, {point.name} needs more")
    own = replace(scale, model=llama(point.width, point.layers, scale.block_length), attackers=ATTACKERS)
    shares = {split: count / DOCUMENTS[point.corpus] for split, count in counts.items()}
    base = f"base-{point.corpus}-{point.width}x{point.layers}-{point.seed}"
    return Cell(own, point.corpus, point.seed, root, variant=point.name, shares=shares, base=base, counts=counts)


def measure(cell: Cell, point: Point) -> None:
    """Add the models of a point and their audit."""
    ready = cell.prepare()
    cell.attack("base", cell.model("base"), ready)
    reference_model(cell, "reference", ready)
    row, model, reference = reference_of_all(cell, ready)
    cell.attack(row, model, reference)
    attackers(cell, ready)
    epochs = [count for count in EPOCHS if count <= 3 or count * point.documents <= LONGEST]
    for count in epochs:
        _plain(cell, ready, plain_row(count), {"epochs": count})
    if point.rates:
        rate, batch = (cell.scale.fine_tuning[key] for key in ("learning_rate", "batch_size"))
        for times in (0.3, 3):
            _plain(cell, ready, f"plain, 3 epochs, rate x {times:g}", {"epochs": 3, "learning_rate": rate * times})
        for times in (0.25, 4):
            changed = {"batch_size": int(batch * times), "learning_rate": rate * times**0.5}
            _plain(cell, ready, f"plain, 3 epochs, batch x {times:g}", {"epochs": 3, **changed})
    if point.defended:
        _defended(cell, ready, reference)
    cell.audit("map", null_model="base")
    if point.shadows:
        run = cell.run("audit-map-lira", "causal_lm", train={"epochs": 3})
        names = {plain_row(count): f"plain {count}" for count in epochs}
        models = {row: (cell.model(name), cell.exported(name)) for row, name in names.items()}
        judged_by_shadows(cell, "map", "plain", run, models)


def plain_row(epochs: int) -> str:
    """Return how plain training by the recipe is called."""
    return f"plain, {epochs} epoch{'s' if epochs > 1 else ''}"


def _plain(cell: Cell, ready: str, row: str, train: Run) -> None:
    name = row.replace(",", "").removesuffix(" epochs").removesuffix(" epoch")
    cell.train(name, cell.run(name.replace(" ", "-"), "causal_lm", train=train), [ready], row=row)


def _defended(cell: Cell, ready: str, reference: str) -> None:
    """Add the dual loss from the weights of its reference, both recipes of ``dual_plus``, and DP-SGD."""
    run = cell.run("dual-from-all", "dual", base=ALL_AUXILIARY, **cell.reference(ALL_AUXILIARY))
    scored = score_of_all(cell, run, reference)
    cell.train("dual from all", run, [scored], row="dual, 3 epochs")
    surrogate = reference_model(cell, "auxiliary", ready)
    cross_fitted(cell, reference)
    made = interpolated(cell, "dual_plus", "cross-fitted", InterpolateConfig.auc, [surrogate, reference])
    cell.attack(*made)
    cell.attack(*scales_from_all(cell, reference))
    private_model(cell, 8, ready)
