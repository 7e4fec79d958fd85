"""What a reviewer asks for beside the paper's rows: other ways to give less away, each on the same data.

All of them are attacked together, by the attackers of the scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paper.models import ALL_AUXILIARY, DELTA, headline_steps, of_all_auxiliary, private_model

if TYPE_CHECKING:
    from paper.cell import Cell

LORA = {"rank": 16, "alpha": 32}
STARTS = {"base": "", ALL_AUXILIARY: ", from reference then auxiliary"}
"""Model that training starts from -> how its rows are named."""


def baselines(cell: Cell) -> None:
    """Reading once, regularization, differential privacy, other references and ascents, and distillation."""
    ready, scored = headline_steps(cell)
    of_all_auxiliary(cell)
    reference = cell.exported(ALL_AUXILIARY)
    for base, start in STARTS.items():
        name = f"one epoch{start}"
        run = cell.run(name.replace(" ", "-"), "causal_lm", base=base, train={"epochs": 1})
        cell.train(name, run, [ready if base == "base" else reference], row=f"plain, one epoch{start}")
    _regularized(cell, ready)
    private_model(cell, 100, ready)
    # The default accountant takes minutes and gigabytes where there is so little noise.
    private_model(cell, 1000, ready, {"privacy": {"epsilon": 1000, "delta": DELTA, "accountant": "rdp"}})
    private_model(cell, 8, ready, {"privacy": {"noise_multiplier": 0.0, "delta": DELTA}}, ", clipped without noise")
    private_model(cell, 8, reference, {"base": ALL_AUXILIARY}, STARTS[ALL_AUXILIARY])
    rate = 5 * {**cell.scale.fine_tuning, **cell.scale.private}["learning_rate"]
    private_model(cell, 8, ready, {"model": {"lora": LORA}, "train": {"learning_rate": rate}}, ", LoRA")
    run = cell.run("selective-base", "selective", **cell.reference("base"))
    base_scored = cell.add("score base selective", ["score", cell.write("selective_base", run)], [ready])
    cell.train("selective base", run, [base_scored], row="selective, base as reference (ssToken's loss part)")
    run = cell.run(
        "dual-confidence",
        "dual",
        base=ALL_AUXILIARY,
        selection={"unlearn": "confidence"},
        **cell.reference(ALL_AUXILIARY),
    )
    cell.train(
        "dual confidence",
        run,
        [scored, f"{cell.name}/score {ALL_AUXILIARY}"],
        row="dual, unlearned by confidence, from reference then auxiliary",
    )
    _distilled(cell)
    cell.audit("baselines")


def _regularized(cell: Cell, ready: str) -> None:
    """Add plain training with more weight decay, a lower rate, and dropout where adapters are trained."""
    rate = cell.scale.fine_tuning["learning_rate"]
    for setting, value in (("weight_decay", 1.0), ("learning_rate", 0.3 * rate)):
        name = f"plain {setting} {value:g}"
        run = cell.run(name.replace(" ", "-"), "causal_lm", train={setting: value})
        cell.train(name, run, [ready], row=f"plain, {setting} {value:g}")
    for dropout in (0.0, 0.3):
        name = f"LoRA dropout {dropout:g}"
        model = {"lora": {**LORA, "dropout": dropout}}
        run = cell.run(name.replace(" ", "-"), "causal_lm", model=model, train={"learning_rate": 5 * rate})
        cell.train(name, run, [ready], row=f"LoRA, plain, dropout {dropout:g}")


def _distilled(cell: Cell) -> None:
    """Add students of models that have seen private documents.

    One learns on each private document what the model without it expects; the other reads auxiliary documents alone,
    which many believe to protect.
    """
    students = {
        "soft labels": (["fold 0", "fold 1"], ["train"], "cross-fitted soft labels, from reference then auxiliary"),
        "public student": (
            ["plain from all"],
            ["reference", "auxiliary"],
            "public student of plain, from reference then auxiliary",
        ),
    }
    for name, (teachers, splits, row) in students.items():
        run = cell.run(name.replace(" ", "-"), "causal_lm", base=ALL_AUXILIARY)
        target = cell.model(name)
        made = cell.add(
            f"distil {name}",
            [
                "tools/paper/distil.py",
                cell.write(name.replace(" ", "_"), run),
                str(target),
                "--teachers",
                *(str(cell.model(teacher)) for teacher in teachers),
                "--splits",
                *splits,
            ],
            [*map(cell.exported, teachers)],
        )
        cell.attack(row, target, made)
