"""The models that several parts of the reproduction attack, each with the steps that make it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from paper.cell import ATTACKER

from dualtok.config.reference import InterpolateConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paper.cell import Cell, Run

Made = tuple[str, Path, str]
"""Row, model, and the step that writes it."""
DELTA = 1e-5
"""Of DP-SGD."""
INTERPOLATED = {
    "dual_plus": ("cross-fitted", 0.53),
    "dual_plus, limit 0.55": ("cross-fitted", 0.55),
    "plain, interpolated": ("plain from all", 0.53),
}
"""Row -> the trained model that is interpolated, and ``interpolate.auc``."""
STOPPED_BY_LIMIT = {
    "plain from all": "plain, from reference then auxiliary",
    "cross-fitted": "dual, cross-fitted",
    "scales from all": "IA3, from reference then auxiliary",
}
"""Run whose best checkpoint within the limit is attacked -> its row."""
LIMITS = (InterpolateConfig.auc, 0.55)
"""``interpolate.auc`` of these."""
DUAL_FROM_ALL = "dual, from reference then auxiliary"
"""Row of the dual loss from the weights of its reference."""
ALL_AUXILIARY = "reference auxiliary"
"""The model that is fine-tuned on the split ``reference``, then on the split ``auxiliary``."""


def of_all_auxiliary(cell: Cell) -> list[Made]:
    """Add what rests on a reference of all auxiliary documents, and that reference first."""
    ready, _ = headline_steps(cell)
    reference = reference_of_all(cell, ready)
    made = {ALL_AUXILIARY: reference}
    starts = {"dual all": "base", "dual from all": ALL_AUXILIARY}
    duals = {
        name: cell.run(name.replace(" ", "-"), "dual", base=base, **cell.reference(ALL_AUXILIARY))
        for name, base in starts.items()
    }
    scored = score_of_all(cell, duals["dual all"], reference[2])
    for name, row in (("dual all", "dual, reference then auxiliary"), ("dual from all", DUAL_FROM_ALL)):
        made[name] = row, cell.model(name), cell.train(name, duals[name], [scored])
    run = cell.run("plain-from-all", "causal_lm", base=ALL_AUXILIARY, **_limited(cell))
    step = cell.train("plain from all", run, [reference[2]])
    made["plain from all"] = "plain, from reference then auxiliary", cell.model("plain from all"), step
    made["scales from all"] = scales_from_all(cell, reference[2])
    made["cross-fitted"] = "dual, cross-fitted", cell.model("cross-fitted"), cross_fitted(cell, reference[2])
    surrogate = reference_model(cell, "auxiliary", ready)
    for row, (name, limit) in INTERPOLATED.items():
        back = interpolated(cell, row, name, limit, [surrogate, reference[2]])
        made[row] = back
    for name, row in STOPPED_BY_LIMIT.items():
        before = cell.exported(name)  # one after the other: both keep what they measure in the run's folder
        for limit in LIMITS:
            stopped = f"limit-{name} {limit:g}"
            path = str(cell.folder / f"{name.replace(' ', '_')}.yaml")
            before = cell.add(
                f"interpolate {stopped}",
                ["interpolate", path, str(cell.model(stopped)), f"interpolate.auc={limit:g}"],
                [surrogate, reference[2], before],
            )
            made[stopped] = f"{row}, stopped by the limit {limit:g}", cell.model(stopped), before
    return list(made.values())


def reference_of_all(cell: Cell, ready: str) -> Made:
    """Add the model that learns ``reference`` first, then ``auxiliary``; the former's step is of the headline part."""
    run = cell.run(
        "reference-auxiliary", "causal_lm", base="reference", train={**reference_training(cell), "split": "auxiliary"}
    )
    step = cell.train(ALL_AUXILIARY, run, [ready, cell.exported("reference")], which="best")
    return "reference, then auxiliary", cell.model(ALL_AUXILIARY), step


def scales_from_all(cell: Cell, reference: str) -> Made:
    """Add plain training of scales alone, from the weights of the reference of all auxiliary documents."""
    step = cell.train("scales from all", scales_run(cell), [reference])
    return "IA3, from reference then auxiliary", cell.model("scales from all"), step


def scales_run(cell: Cell) -> Run:
    """Return the training of scales alone, from the weights of the reference of all auxiliary documents."""
    limited = _limited(cell)
    train = {**limited.pop("train"), **cell.scale.ia3}
    return cell.run("scales-from-all", "causal_lm", base=ALL_AUXILIARY, model={"ia3": {}}, train=train, **limited)


def score_of_all(cell: Cell, run: Run, reference: str) -> str:
    """Add the scores of the reference of all auxiliary documents, which ``run`` and others read."""
    return cell.add(f"score {ALL_AUXILIARY}", ["score", cell.write("dual_all", run)], [reference])


def interpolated(cell: Cell, row: str, name: str, limit: float, references: Sequence[str]) -> Made:
    """Add a trained model taken back towards the reference of all auxiliary documents, up to ``interpolate.auc``."""
    models = {"model": name, "reference": ALL_AUXILIARY, "surrogate_reference": "auxiliary"}
    back = f"back-{name}" + ("" if limit == InterpolateConfig.auc else f" {limit:g}")
    run = {
        "data": cell.data,
        "output_dir": str(cell.folder / back),
        "seed": cell.seed,
        "audit": {"batch_size": 16},
        "interpolate": {"auc": limit} | {key: str(cell.model(value)) for key, value in models.items()},
    }
    step = cell.add(
        back.replace("back-", "interpolate "),
        ["interpolate", cell.write(back, run), str(cell.model(back))],
        [*references, cell.exported(name)],
    )
    return row, cell.model(back), step


def attack_plain_stopped(cell: Cell) -> None:
    """Let the next audit attack plain training from the base as it was early, and at its best on validation."""
    early = cell.scale.early
    attack_stopped(cell, "plain", (early, 2 * early, 3 * early))
    run = {"output_dir": str(cell.folder / "plain"), "model": cell.scale.adapters}
    cell.export("plain best", run, f"{cell.name}/train plain", row="plain, best on validation", which="best")


def steps_from_all(cell: Cell) -> tuple[int, ...]:
    """Return the steps at which plain training from the reference of all auxiliary documents is attacked.

    They lie closer than those from the base: members stand out sooner.
    """
    third = max(1, cell.scale.early // 3)
    return tuple(third * number for number in range(1, 7))


def attack_stopped(cell: Cell, name: str, steps: Sequence[int], row: str = "") -> None:
    """Let the next audit attack a model as it was after some steps."""
    run = {"output_dir": str(cell.folder / name.replace(" ", "-")), "model": cell.scale.adapters}
    for step in steps:
        cell.export(
            f"{name}, step {step}",
            run,
            f"{cell.name}/train {name}",
            row=f"{row or name}, step {step}",
            which=f"step-{step:08d}",
        )


def reference_model(cell: Cell, split: str, ready: str, *, row: str | None = None) -> str:
    """Train the base plainly on a split, as references are; returns the step that exports it."""
    run = cell.run(split, "causal_lm", train={**reference_training(cell), "split": split})
    return cell.train(split, run, [ready], row=row, which="best")


def attackers(cell: Cell, ready: str) -> None:
    """Add the attacker's references: the base, trained by the recipe of plain training on documents of their own."""
    for name, attacker in cell.scale.attackers.items():
        folder = cell.folder / f"attacker-{attacker.times:g}"
        documents = ["--of", "train", "--times", f"{attacker.times:g}"]
        drawn = cell.add(
            f"documents of {folder.name}",
            ["tools/paper/subset.py", cell.data["dir"], ATTACKER, str(folder), *documents],
            [ready],
        )
        known = cell.counts.get("train")
        count = None if known is None else max(1, round(attacker.times * known))
        run = cell.run(name, "causal_lm", documents=count, train={"epochs": attacker.epochs, "split": ATTACKER})
        run["data"] = {**cell.data, "dir": str(folder)}
        cell.train(name, run, [drawn])


def reference_training(cell: Cell) -> Run:
    """Return the section ``train`` of references."""
    return {"epochs": cell.scale.reference_epochs, "evaluate_every": 10}


def private_model(cell: Cell, epsilon: float, ready: str, changes: Run | None = None, what: str = "") -> None:
    """Add a DP-SGD run; ``changes`` in its sections, and another ``base``, are named by ``what``."""
    changes = changes or {}
    train = {**cell.scale.private, "engine": "opacus", "precision": "fp32", **changes.get("train", {})}
    privacy = changes.get("privacy", {"epsilon": epsilon, "delta": DELTA})
    name = f"dp-sgd {epsilon:g}{what.replace(',', '')}"
    run = cell.run(
        name.replace(" ", "-"),
        "causal_lm",
        base=changes.get("base", "base"),
        model=changes.get("model", {}),
        train=train,
        privacy=privacy,
    )
    row = f"DP-SGD ({epsilon:g}, {DELTA:g}){what}" if "epsilon" in privacy else f"DP-SGD{what}"
    cell.train(name, run, [ready], row=row)


def cross_fitted(cell: Cell, reference: str) -> str:
    """Add references without one fold each, and the dual model that learns from them; all start from ``reference``."""
    folds = []
    for fold in (0, 1):
        train = {"leave_out": {"fold": fold, "folds": 2}, "evaluate_every": cell.scale.early}
        run = cell.run(f"fold-{fold}", "causal_lm", base=ALL_AUXILIARY, train=train)
        folds.append(cell.train(f"fold {fold}", run, [reference], which="best"))
    models = [str(cell.model(f"fold {fold}")) for fold in (0, 1)]
    run = cell.run(
        "cross-fitted", "dual", base=ALL_AUXILIARY, reference={"folds": models, "batch_size": 16}, **_limited(cell)
    )
    scored = cell.add("score folds", ["score", cell.write("cross-fitted", run)], folds)
    return cell.train("cross-fitted", run, [scored])


def _limited(cell: Cell) -> Run:
    """Return the sections of a run whose checkpoints are kept, to be tried by ``dualtok interpolate``."""
    return {
        "train": {"checkpoint_every": min(steps_from_all(cell)), "checkpoint_keep": 100},
        "audit": {"batch_size": 16},
        "interpolate": {
            "along": "run",
            "reference": str(cell.model(ALL_AUXILIARY)),
            "surrogate_reference": str(cell.model("auxiliary")),
        },
    }


def judged_by_shadows(cell: Cell, name: str, kind: str, run: Run, models: dict[str, tuple[Path, str]]) -> None:
    """Add an audit of models, given with their steps, whose shadow models are trained as ``run`` says."""
    shadows = cell.scale.shadows
    run["audit"] = {
        "models": {f"{row}, by {shadows} {kind} shadows": str(path) for row, (path, _) in models.items()},
        "attacks": ["loss", "ref", "min_k", "zlib"],
        "batch_size": 16,
        "shadow_checkpoint": "latest",
        **cell.references(list(cell.scale.attackers)),
        "shadows": shadows,
    }
    needs = [step for _, step in models.values()]
    cell.add(
        f"audit-lira-{name}",
        ["audit", cell.write(f"audit-lira-{name}", run)],
        [*needs, *map(cell.exported, cell.scale.attackers)],
    )


def headline_steps(cell: Cell) -> tuple[str, str]:
    """Return the steps of the headline part that others build on: prepared data, and the reference's scores."""
    return f"{cell.name}/prepare", f"{cell.name}/score reference"


def shape(cell: Cell) -> Run:
    """Return the configuration of a model of the base model's shape."""
    if "config" in cell.scale.model:
        return dict(cell.scale.model["config"])
    from transformers import AutoConfig

    shape: Run = json.loads(AutoConfig.from_pretrained(cell.scale.model["path"]).to_json_string(use_diff=True))
    return shape


def vocabulary(cell: Cell) -> int:
    """Return how many tokens the cell's models know."""
    if "config" in cell.scale.model:
        return cell.scale.vocabulary
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(cell.scale.model["path"]).vocab_size)
