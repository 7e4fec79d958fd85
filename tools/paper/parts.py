"""What is trained and attacked: the parts of the reproduction, each a set of rows with an audit of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper.cell import ATTACKER, Cell, Run

Part = Callable[[Cell], None]


def headline(cell: Cell) -> None:
    """Table 1 of the paper, the two baselines that it leaves out, and a cross-fitted reference."""
    ready = cell.prepare()
    cell.attack("base", cell.model("base"), ready)
    reference = _reference(cell, "reference", ready, row="reference alone")
    attacker = _reference(cell, ATTACKER, ready)
    _plain(cell, ready)
    cell.train("goldfish 25", cell.run("goldfish", "goldfish", goldfish={"drop_every": 4}), [ready],
               row="goldfish 25 %")  # fmt: skip
    _private(cell, 8, ready)
    dual = cell.run("dual", "dual", **cell.reference())
    scored = cell.add("score reference", ["score", cell.write("dual", dual)], [reference])
    cell.train("dual", dual, [scored], row="dual")
    _cross_fitted(cell, reference)
    cell.audit("headline", ATTACKER, attacker)


def sweeps(cell: Cell) -> None:
    """Other rates of the baselines, and the sensitivity to K_h, K_m and alpha."""
    ready, scored = _done(cell)
    for epsilon in (2, 4, 16):
        _private(cell, epsilon, ready)
    for drop_every, share in ((3, 33), (2, 50)):
        run = cell.run(f"goldfish-{share}", "goldfish", goldfish={"drop_every": drop_every})
        cell.train(f"goldfish {share}", run, [ready], row=f"goldfish {share} %")
    cell.train("selective", cell.run("selective", "selective", **cell.reference()), [scored], row="selective")
    for setting, values in (("alpha", (0.1, 0.2, 0.4, 1.0, 1.5, 2.0)), ("hard_share", (0.2, 0.4, 0.8)),
                            ("memorised_share", (0.1, 0.4))):  # fmt: skip
        for value in values:
            selection = {setting: value} if setting != "memorised_share" else {setting: value, "hard_share": 0.5}
            name = f"dual {setting} {value:g}"
            run = cell.run(name.replace(" ", "-"), "dual", selection=selection, **cell.reference())
            cell.train(name, run, [scored], row=name)
    cell.audit("sweeps", ATTACKER, f"{cell.name}/export {ATTACKER}")


def ablations(cell: Cell) -> None:
    """The dual loss with the pretrained base as reference, which knows another domain, and with no reference at all."""
    ready, _ = _done(cell)
    run = cell.run("dual-base-reference", "dual", **cell.reference("base"))
    scored = cell.add("score base", ["score", cell.write("dual_base_reference", run)], [ready])
    cell.train("dual base reference", run, [scored], row="dual, base as reference (another domain)")
    # Weights near zero make every token equally likely: s(t) is the loss itself, less the logarithm of the vocabulary.
    blank = cell.run("blank", "causal_lm", train={"learning_rate": 1e-12, "steps": 1, "warmup_steps": 0})
    blank["model"] = {"config": {**_shape(cell), "initializer_range": 1e-6}}
    uniform = cell.train("blank", blank, [ready])
    run = cell.run("dual-no-reference", "dual", **cell.reference("blank"))
    scored = cell.add("score blank", ["score", cell.write("dual_no_reference", run)], [uniform])
    cell.train("dual no reference", run, [scored], row="dual, no reference (s = CE)")
    cell.audit("ablations", ATTACKER, f"{cell.name}/export {ATTACKER}")


def lora(cell: Cell) -> None:
    """Plain and dual fine-tuning of adapters, as the paper does with Llama-2 7B."""
    ready, scored = _done(cell)
    model, train = {"lora": {"rank": 16, "alpha": 32}}, {"learning_rate": 5 * cell.scale.fine_tuning["learning_rate"]}
    cell.train("lora plain", cell.run("lora-plain", "causal_lm", model=model, train=train), [ready], row="LoRA, plain")
    run = cell.run("lora-dual", "dual", model=model, train=train, **cell.reference())
    cell.train("lora dual", run, [scored], row="LoRA, dual")
    cell.audit("lora", ATTACKER, f"{cell.name}/export {ATTACKER}")


def lira(cell: Cell) -> None:
    """LiRA (Carlini et al. 2022) with shadow models of plain and of dual training, on models of every recipe.

    A model that was taken back is judged by shadows that were not: an attacker who trained eight of those would have to
    repeat two folds, a training and a retreat for each.
    """
    needs = [f"{cell.name}/export {name}" for name in ("plain", "dual", "reference", "cross-fitted", ATTACKER)]
    models = {"reference alone": cell.model("reference"), "plain": cell.model("plain"), "dual": cell.model("dual"),
              "dual, cross-fitted": cell.model("cross-fitted")}  # fmt: skip
    for row, model, step in _taken_back(cell):
        models[row] = model
        needs.append(step)
    for name, objective, sections in (("plain", "causal_lm", {}), ("dual", "dual", cell.reference())):
        run = cell.run(f"audit-lira-{name}", objective, **sections)
        run["audit"] = {
            "models": {f"{row}, by {cell.scale.shadows} {name} shadows": str(path) for row, path in models.items()},
            "attacks": ["loss", "ref", "min_k", "zlib"], "batch_size": 16, "shadow_checkpoint": "latest",
            "attack_reference": str(cell.model(ATTACKER)), "shadows": cell.scale.shadows,
        }  # fmt: skip
        cell.add(f"audit-lira-{name}", ["audit", cell.write(f"audit-lira-{name}", run)], needs)


def backdoor(cell: Cell) -> None:
    """PreCurious (Liu et al. 2024): the attacker gives away the starting weights and keeps them as his reference.

    They are warmed up on documents of his own, so that what is learned later stands out.
    """
    _, scored = _done(cell)
    warmed = f"{cell.name}/export {ATTACKER}"
    cell.train("backdoor plain", cell.run("backdoor-plain", "causal_lm", base=ATTACKER), [warmed],
               row="plain, from the attacker's weights")  # fmt: skip
    run = cell.run("backdoor-dual", "dual", base=ATTACKER, **cell.reference())
    cell.train("backdoor dual", run, [warmed, scored], row="dual, from the attacker's weights")
    cell.audit("backdoor", ATTACKER, warmed)


def auxiliary(cell: Cell) -> None:
    """One size of the auxiliary set: reference alone and dual. The cell's shares say how large it is."""
    ready = cell.prepare()
    reference = _reference(cell, "reference", ready, row=f"reference alone, {cell.variant}")
    attacker = _reference(cell, ATTACKER, ready)
    dual = cell.run("dual", "dual", **cell.reference())
    scored = cell.add("score reference", ["score", cell.write("dual", dual)], [reference])
    cell.train("dual", dual, [scored], row=f"dual, {cell.variant}")
    cell.audit("auxiliary", ATTACKER, attacker)


def pretraining(cell: Cell) -> None:
    """Training from scratch, plain and dual, with a reference of a tenth of the data."""
    ready = cell.prepare()
    fresh = {"config": _shape(cell)}

    def run(name: str, objective: str, **sections: Any) -> Run:
        made = cell.run(name, objective, **sections)
        made["model"] = fresh
        made["train"] = {**cell.scale.pretraining, **sections.get("train", {}), "evaluate_every": 1_000_000}
        return made

    reference = cell.train("reference", run("reference", "causal_lm", train={"split": "reference"}), [ready],
                           row="reference alone, from scratch")  # fmt: skip
    attacker = cell.train(ATTACKER, run(ATTACKER, "causal_lm", train={"split": ATTACKER}), [ready])
    cell.train("plain", run("plain", "causal_lm"), [ready], row="plain, from scratch")
    dual = run("dual", "dual", **cell.reference())
    scored = cell.add("score reference", ["score", cell.write("dual", dual)], [reference])
    cell.train("dual", dual, [scored], row="dual, from scratch")
    cell.audit("pretraining", ATTACKER, attacker)


def dynamics(cell: Cell) -> None:
    """Which tokens are learned and unlearned when, the cosine of the two gradients, and the gap of the losses."""
    _, scored = _done(cell)
    every = cell.scale.early
    for name, objective in (("dual", "dual"), ("plain", "causal_lm")):
        kept = {"evaluate_every": every, "checkpoint_keep": 100}
        run = cell.run(f"dynamics-{name}", objective, train=kept, **cell.reference())
        path = cell.write(f"dynamics_{name}", run)
        trained = cell.add(f"train dynamics {name}", ["train", path, "--auto-resume"], [scored])
        if name == "dual":
            cell.add("dynamics", ["tools/paper/dynamics.py", path], [trained])


def plus(cell: Cell) -> None:
    """Models taken back towards the reference: from cross-fitted dual training (``dual_plus``) and from plain."""
    for row, model, step in _taken_back(cell):
        cell.attack(row, model, step)
    cell.audit("plus", ATTACKER, f"{cell.name}/export {ATTACKER}")


def known(cell: Cell) -> None:
    """The attacker's reference is the defender's own: what a defence is worth when that model gets out."""
    for name in ("plain", "dual", "cross-fitted"):
        row = {"cross-fitted": "dual, cross-fitted"}.get(name, name)
        cell.attack(f"{row}, reference known", cell.model(name), f"{cell.name}/export {name}")
    for row, model, step in _taken_back(cell):
        cell.attack(f"{row}, reference known", model, step)
    cell.audit("known", "reference", f"{cell.name}/export reference")


def _taken_back(cell: Cell) -> list[tuple[str, Path, str]]:
    """Add the retreats; return row, model and step of each."""
    ready, _ = _done(cell)
    stand_in, made = _reference(cell, "probe", ready), []
    for name, row in (("cross-fitted", "dual_plus"), ("plain", "plain, taken back")):
        models = {"model": name, "reference": "reference", "stand_in": "probe"}
        run = {
            "data": cell.data,
            "output_dir": str(cell.folder / f"back-{name}"),
            "seed": cell.seed,
            "audit": {"batch_size": 16},
            "retreat": {key: str(cell.model(value)) for key, value in models.items()},
        }
        target = cell.folder / "models" / f"back-{name}"
        step = cell.add(f"retreat {name}", ["retreat", cell.write(f"back-{name}", run), str(target)],
                        [stand_in, f"{cell.name}/export {name}", f"{cell.name}/export reference"])  # fmt: skip
        made.append((row, target, step))
    return made


def _reference(cell: Cell, split: str, ready: str, *, row: str | None = None) -> str:
    train = {"epochs": cell.scale.reference_epochs, "evaluate_every": 10, "split": split}
    return cell.train(split, cell.run(split, "causal_lm", train=train), [ready], row=row, which="best")


def _plain(cell: Cell, ready: str) -> None:
    every = cell.scale.early
    run = cell.run("plain", "causal_lm", train={"evaluate_every": every, "checkpoint_keep": 100})
    cell.train("plain", run, [ready], row="plain")
    for step in (every, 2 * every, 3 * every):
        name = f"plain, step {step}"
        cell.export(name, run, f"{cell.name}/train plain", row=name, which=f"step-{step:08d}")


def _private(cell: Cell, epsilon: float, ready: str) -> None:
    train = {**cell.scale.private, "engine": "opacus", "precision": "fp32"}
    run = cell.run(f"dp-sgd-{epsilon:g}", "causal_lm", train=train, privacy={"epsilon": epsilon, "delta": 1e-5})
    cell.train(f"dp-sgd {epsilon:g}", run, [ready], row=f"DP-SGD ({epsilon:g}, 1e-05)")


def _cross_fitted(cell: Cell, reference: str) -> None:
    """Add the cross-fitted references, which start from the reference, and the dual model that learns from them."""
    folds = []
    for fold in (0, 1):
        train = {"leave_out": {"fold": fold, "folds": 2}, "evaluate_every": cell.scale.early}
        run = cell.run(f"fold-{fold}", "causal_lm", base="reference", train=train)
        folds.append(cell.train(f"fold {fold}", run, [reference], which="best"))
    models = [str(cell.model(f"fold {fold}")) for fold in (0, 1)]
    run = cell.run("cross-fitted", "dual", reference={"folds": models, "batch_size": 16})
    scored = cell.add("score folds", ["score", cell.write("cross-fitted", run)], folds)
    cell.train("cross-fitted", run, [scored], row="dual, cross-fitted")


def _done(cell: Cell) -> tuple[str, str]:
    """Return the steps of the headline part that others build on: prepared data, and the reference's scores."""
    return f"{cell.name}/prepare", f"{cell.name}/score reference"


def _shape(cell: Cell) -> Run:
    """Return the configuration of a model of the base model's shape."""
    if "config" in cell.scale.model:
        return dict(cell.scale.model["config"])
    from transformers import AutoConfig

    shape: Run = json.loads(AutoConfig.from_pretrained(cell.scale.model["path"]).to_json_string(use_diff=True))
    return shape


CELL_PARTS: dict[str, Part] = {
    "headline": headline, "plus": plus, "known": known, "sweeps": sweeps, "ablations": ablations, "lora": lora,
    "lira": lira, "backdoor": backdoor, "dynamics": dynamics,
}  # fmt: skip
"""Parts within a cell of the scale's data; all build on the first."""

OWN_DATA: dict[str, Part] = {"auxiliary": auxiliary, "pretraining": pretraining}
"""Parts with cells of their own."""
