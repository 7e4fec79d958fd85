"""What is trained and attacked: the parts of the reproduction, each a set of rows with an audit of its own.

What several parts share is in ``models.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from paper.baselines import baselines
from paper.cell import ATTACKER, Cell, Run
from paper.models import (
    ALL_AUXILIARY,
    DELTA,
    DUAL_FROM_ALL,
    INTERPOLATED,
    LIMITS,
    STOPPED_BY_LIMIT,
    Made,
    attack_plain_stopped,
    attack_stopped,
    attackers,
    headline_steps,
    judged_by_shadows,
    of_all_auxiliary,
    private_model,
    reference_model,
    scales_run,
    shape,
    steps_from_all,
    vocabulary,
)

from dualtok.audit.attacks.registry import default_attacks, names_of

Part = Callable[[Cell], None]
RELEASES = 8
"""Folds of the private documents, of which a first release lacks one."""
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Values of w at which models between the reference and a trained model are attacked."""


def headline(cell: Cell) -> None:
    """Table 1 of the paper, and what it leaves out: the reference alone, and plain training that stops early."""
    ready = cell.prepare()
    cell.attack("base", cell.model("base"), ready)
    reference = reference_model(cell, "reference", ready, row="reference alone")
    attackers(cell, ready)
    run = cell.run("plain", "causal_lm", train={"evaluate_every": cell.scale.early, "checkpoint_keep": 100})
    cell.train("plain", run, [ready], row="plain")
    attack_plain_stopped(cell)
    cell.train(
        "goldfish 25", cell.run("goldfish", "goldfish", goldfish={"drop_every": 4}), [ready], row="goldfish 25 %"
    )
    private_model(cell, 8, ready)
    dual = cell.run("dual", "dual", **cell.reference())
    scored = cell.add("score reference", ["score", cell.write("dual", dual)], [reference])
    cell.train("dual", dual, [scored], row="dual")
    cell.audit("headline", null_model="base")


def sweeps(cell: Cell) -> None:
    """Other rates of the baselines, and the sensitivity to K_h, K_m and alpha."""
    ready, scored = headline_steps(cell)
    for epsilon in (2, 4, 16):
        private_model(cell, epsilon, ready)
    for drop_every, share in ((3, 33), (2, 50)):
        run = cell.run(f"goldfish-{share}", "goldfish", goldfish={"drop_every": drop_every})
        cell.train(f"goldfish {share}", run, [ready], row=f"goldfish {share} %")
    cell.train("selective", cell.run("selective", "selective", **cell.reference()), [scored], row="selective")
    for setting, values in (
        ("alpha", (0.1, 0.2, 0.4, 1.0, 1.5, 2.0)),
        ("hard_share", (0.2, 0.4, 0.8)),
        ("memorized_share", (0.1, 0.4)),
    ):
        for value in values:
            selection = {setting: value} if setting != "memorized_share" else {setting: value, "hard_share": 0.5}
            name = f"dual {setting} {value:g}"
            run = cell.run(name.replace(" ", "-"), "dual", selection=selection, **cell.reference())
            cell.train(name, run, [scored], row=name)
    cell.audit("sweeps")


def private(cell: Cell) -> None:
    """DP-SGD with other settings, and with clipping alone: is it the noise that costs perplexity, or the tuning?"""
    ready, _ = headline_steps(cell)
    for change in ({"learning_rate": 1e-3}, {"learning_rate": 4e-3}, {"epochs": 12}, {"batch_size": 64}):
        [(setting, value)] = change.items()
        private_model(cell, 8, ready, {"train": change}, f", {setting} {value:g}")
    private_model(cell, 8, ready, {"privacy": {"noise_multiplier": 0.0, "delta": DELTA}}, ", clipped without noise")
    cell.audit("private")


def longer(cell: Cell) -> None:
    """Plain and dual training for as many epochs as the reference has had."""
    ready, scored = headline_steps(cell)
    epochs = cell.scale.reference_epochs
    for name, objective, sections in (("plain", "causal_lm", {}), ("dual", "dual", cell.reference())):
        run = cell.run(f"longer-{name}", objective, train={"epochs": epochs}, **sections)
        cell.train(f"longer {name}", run, [ready if name == "plain" else scored], row=f"{name}, {epochs:g} epochs")
    cell.audit("longer")


def ablations(cell: Cell) -> None:
    """The dual loss from the reference's weights, with the base as reference (another domain), and with no reference.

    Without a reference s(t) is the loss itself. It is never below the paper's tau of 0, so that nothing is unlearned;
    or tau is the loss of a guess, the logarithm of the vocabulary, and whatever is known better is unlearned.
    """
    ready, scored = headline_steps(cell)
    run = cell.run("dual-from-reference", "dual", base="reference", **cell.reference())
    cell.train("dual from reference", run, [scored], row="dual, from the reference's weights")
    run = cell.run("dual-base-reference", "dual", **cell.reference("base"))
    scored = cell.add("score base", ["score", cell.write("dual_base_reference", run)], [ready])
    cell.train("dual base reference", run, [scored], row="dual, base as reference (another domain)")
    # Weights near zero make every token equally likely: s(t) is the loss itself, less the logarithm of the vocabulary.
    blank = cell.run("blank", "causal_lm", train={"learning_rate": 1e-12, "steps": 1, "warmup_steps": 0})
    blank["model"] = {"config": {**shape(cell), "initializer_range": 1e-6}}
    uniform = cell.train("blank", blank, [ready])
    run = cell.run("dual-no-reference", "dual", **cell.reference("blank"))
    scored = cell.add("score blank", ["score", cell.write("dual_no_reference", run)], [uniform])
    guess = math.log(vocabulary(cell))
    cell.train("dual no reference", run, [scored], row=f"dual, no reference (s = CE, tau = {guess:.2f})")
    run = cell.run("dual-no-reference-0", "dual", selection={"tau": -guess}, **cell.reference("blank"))
    cell.train("dual no reference 0", run, [scored], row="dual, no reference (s = CE, tau = 0)")
    cell.audit("ablations")


def lora(cell: Cell) -> None:
    """Plain and dual fine-tuning of adapters, as the paper does with Llama-2 7B."""
    ready, scored = headline_steps(cell)
    model, train = {"lora": {"rank": 16, "alpha": 32}}, {"learning_rate": 5 * cell.scale.fine_tuning["learning_rate"]}
    cell.train("lora plain", cell.run("lora-plain", "causal_lm", model=model, train=train), [ready], row="LoRA, plain")
    run = cell.run("lora-dual", "dual", model=model, train=train, **cell.reference())
    cell.train("lora dual", run, [scored], row="LoRA, dual")
    cell.audit("lora")


def lira(cell: Cell) -> None:
    """LiRA (Carlini et al. 2022): shadow models of plain training, and of dual training with either reference.

    Interpolated models are attacked with shadows that are not interpolated: for interpolated ones the attacker would
    have to repeat two folds, a training and an interpolation for each of the eight. Shadows of dual training that start
    from the reference of all auxiliary documents also attack models at several values of w; plain ones start from the
    base.
    """
    rows = {"reference alone": "reference", "plain": "plain", "dual": "dual"}
    half = {row: (cell.model(name), f"{cell.name}/export {name}") for row, name in rows.items()}
    whole = {row: (model, step) for row, model, step in of_all_auxiliary(cell)}
    judged_by_shadows(cell, "plain", "plain", cell.run("audit-lira-plain", "causal_lm"), half | whole)
    run = cell.run("audit-lira-dual", "dual", **cell.reference())
    judged_by_shadows(cell, "dual", "dual", run, half)
    whole |= {row: (model, step) for row, model, step in _mixed(cell)}
    run = cell.run("audit-lira-plus", "dual", base=ALL_AUXILIARY, **cell.reference(ALL_AUXILIARY))
    judged_by_shadows(cell, "plus", "dual (from reference then auxiliary)", run, whole)


def lira_scales(cell: Cell) -> None:
    """LiRA against scales alone, by shadow models of the same recipe that start from the same reference.

    Models that the limit has stopped are attacked with shadow models that were not: they have learned more.
    """
    of_all_auxiliary(cell)
    row = STOPPED_BY_LIMIT["scales from all"]
    models = {row: (cell.model("scales from all"), cell.exported("scales from all"))}
    for limit in LIMITS:
        stopped = f"limit-scales from all {limit:g}"
        models[f"{row}, stopped by the limit {limit:g}"] = (cell.model(stopped), f"{cell.name}/interpolate {stopped}")
    run = {**scales_run(cell), "output_dir": str(cell.folder / "audit-lira-scales")}
    judged_by_shadows(cell, "scales", "IA3", run, models)


def _mixed(cell: Cell) -> list[Made]:
    """Add models between the reference of all auxiliary documents and trained ones, at several values of w."""
    made = []
    for name, row in (
        ("cross-fitted", "dual, cross-fitted"),
        ("plain from all", "plain, from reference then auxiliary"),
    ):
        for w in WEIGHTS:
            target = cell.model(f"{name} {w:g}")
            ends = [str(cell.model(ALL_AUXILIARY)), str(cell.model(name))]
            step = cell.add(
                f"mix {name} {w:g}",
                ["tools/paper/mix.py", *ends, str(w), str(target)],
                [f"{cell.name}/export {ALL_AUXILIARY}", f"{cell.name}/export {name}"],
            )
            made.append((f"{row}, at w = {w:g}", target, step))
    return made


def backdoor(cell: Cell) -> None:
    """PreCurious (Liu et al. 2024): the attacker publishes the starting weights and keeps them as their reference.

    The weights were first trained on the attacker's own documents, so that what is learned later is easier to see.
    """
    _, scored = headline_steps(cell)
    attacker = next(iter(cell.scale.attackers))
    warmed = cell.exported(attacker)
    cell.train(
        "backdoor plain",
        cell.run("backdoor-plain", "causal_lm", base=attacker),
        [warmed],
        row="plain, from the attacker's weights",
    )
    run = cell.run("backdoor-dual", "dual", base=attacker, **cell.reference())
    cell.train("backdoor dual", run, [warmed, scored], row="dual, from the attacker's weights")
    cell.audit("backdoor")


def auxiliary(cell: Cell) -> None:
    """One size of the auxiliary set: reference alone and dual. The cell's shares say how large it is."""
    ready = cell.prepare()
    reference = reference_model(cell, "reference", ready, row=f"reference alone, {cell.variant}")
    attackers(cell, ready)
    dual = cell.run("dual", "dual", **cell.reference())
    scored = cell.add("score reference", ["score", cell.write("dual", dual)], [reference])
    cell.train("dual", dual, [scored], row=f"dual, {cell.variant}")
    cell.audit("auxiliary")


def pretraining(cell: Cell) -> None:
    """Training from scratch, plain and dual, with a reference of a tenth of the data."""
    ready = cell.prepare()
    fresh = {"config": shape(cell)}

    def run(name: str, objective: str, **sections: Any) -> Run:
        made = cell.run(name, objective, **sections)
        made["model"] = fresh
        made["train"] = {**cell.scale.pretraining, **sections.get("train", {}), "evaluate_every": 1_000_000}
        return made

    reference = cell.train(
        "reference",
        run("reference", "causal_lm", train={"split": "reference"}),
        [ready],
        row="reference alone, from scratch",
    )
    cell.train(ATTACKER, run(ATTACKER, "causal_lm", train={"split": ATTACKER}), [ready])
    cell.train("plain", run("plain", "causal_lm"), [ready], row="plain, from scratch")
    dual = run("dual", "dual", **cell.reference())
    scored = cell.add("score reference", ["score", cell.write("dual", dual)], [reference])
    cell.train("dual", dual, [scored], row="dual, from scratch")
    cell.audit("pretraining", [ATTACKER])


def dynamics(cell: Cell) -> None:
    """Which tokens are learned and unlearned when, the cosine of the two gradients, and the gap of the losses."""
    _, scored = headline_steps(cell)
    every = cell.scale.early
    for name, objective in (("dual", "dual"), ("plain", "causal_lm")):
        kept = {"evaluate_every": every, "checkpoint_keep": 100}
        run = cell.run(f"dynamics-{name}", objective, train=kept, **cell.reference())
        path = cell.write(f"dynamics_{name}", run)
        trained = cell.add(f"train dynamics {name}", ["train", path, "--auto-resume"], [scored])
        if name == "dual":
            cell.add("dynamics", ["tools/paper/dynamics.py", path], [trained])


def plus(cell: Cell) -> None:
    """``dual_plus``, and the methods that it must beat.

    That is its reference alone, which has learned all auxiliary documents, the dual loss against that reference, and
    plain training that stops early, from the base and from the reference. Plain training interpolated in the same way
    shows what the dual loss adds.
    """
    attack_plain_stopped(cell)
    for row, model, step in of_all_auxiliary(cell):
        cell.attack(row, model, step)
    attack_stopped(cell, "plain from all", steps_from_all(cell), row="plain, from reference then auxiliary")
    cell.audit("plus")


def frontier(cell: Cell) -> None:
    """Models between the reference of all auxiliary documents and trained models."""
    of_all_auxiliary(cell)
    for row, model, step in _mixed(cell):
        cell.attack(row, model, step)
    cell.audit("frontier")


def known(cell: Cell) -> None:
    """The attacker's reference is the defender's own: how well each defence does when that model leaks."""
    for name in ("plain", "dual"):
        cell.attack(f"{name}, reference known", cell.model(name), f"{cell.name}/export {name}")
    cell.audit("known", ["reference"])
    _, *models = of_all_auxiliary(cell)
    for row, model, step in models:
        cell.attack(f"{row}, reference known", model, step)
    cell.audit("known-plus", [ALL_AUXILIARY])


def releases(cell: Cell) -> None:
    """Two releases: the attacker has the first, and asks which documents were added before the second.

    The first is trained by the same recipe without one of :data:`RELEASES` folds. That fold is the members.
    """
    ready, _ = headline_steps(cell)
    of_all_auxiliary(cell)
    added = cell.folder / "added"
    arguments = ["tools/paper/subset.py", cell.data["dir"], "train", str(added)]
    drawn = cell.add("added documents", [*arguments, "--fold", "0", str(RELEASES), "--with", "held_out"], [ready])
    dual = cell.run("dual-from-all", "dual", base=ALL_AUXILIARY, **cell.reference(ALL_AUXILIARY))
    kinds = {
        "plain": (cell.run("plain", "causal_lm"), ready),
        "dual from all": (dual, f"{cell.name}/score {ALL_AUXILIARY}"),
        "scales from all": (scales_run(cell), cell.exported(ALL_AUXILIARY)),
    }
    rows = {"plain": "plain", "dual from all": DUAL_FROM_ALL, "scales from all": STOPPED_BY_LIMIT["scales from all"]}
    for name, (whole, needed) in kinds.items():
        first = f"first {name}"
        train = {**whole["train"], "leave_out": {"fold": 0, "folds": RELEASES}}
        run = {**whole, "train": train, "output_dir": str(cell.folder / first.replace(" ", "-"))}
        run.pop("interpolate", None)
        cell.train(first, run, [needed, drawn])
        cell.attack(f"{rows[name]}, first release known", cell.model(name), cell.exported(name))
        cell.audit(f"releases-{name.replace(' ', '-')}", [first], data={**cell.data, "dir": str(added)})


def further(cell: Cell) -> None:
    """The attacks that run a model again, beside all of the others, on one model of each kind."""
    rows = {
        "reference alone": "reference",
        "plain": "plain",
        "goldfish 25 %": "goldfish 25",
        "dual": "dual",
        f"DP-SGD (8, {DELTA:g})": "dp-sgd 8",
    }
    models = [(row, cell.model(name), f"{cell.name}/export {name}") for row, name in rows.items()]
    interpolated = [made for made in of_all_auxiliary(cell) if made[0] in INTERPOLATED]
    for row, model, step in (*models, *interpolated):
        cell.attack(f"{row}, further attacks", model, step)
    attacks = [*default_attacks(), *names_of("joint", "rerun")]
    cell.audit("further", attacks=attacks, reruns={"neighbors": cell.scale.neighbors})


CELL_PARTS: dict[str, Part] = {
    "headline": headline,
    "plus": plus,
    "frontier": frontier,
    "known": known,
    "releases": releases,
    "further": further,
    "baselines": baselines,
    "sweeps": sweeps,
    "private": private,
    "ablations": ablations,
    "longer": longer,
    "lora": lora,
    "lira": lira,
    "lira-scales": lira_scales,
    "backdoor": backdoor,
    "dynamics": dynamics,
}
"""Parts within a cell of the scale's data; all build on the first."""

OWN_DATA: dict[str, Part] = {"auxiliary": auxiliary, "pretraining": pretraining}
"""Parts with cells of their own."""
