"""The reproduction of the paper's tables, in miniature: every step a real command, done once."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dualtok.audit.attacks.registry import names_of
from tests.support import ROOT, environment, python

if TYPE_CHECKING:
    from pathlib import Path

PARTS = ("headline", "plus", "further", "baselines", "dynamics", "pretraining")
STOPS = {"plain, step 2", "plain, step 4", "plain, step 6"}
HEADLINE = {
    "base",
    "reference alone",
    "plain",
    "plain, best on validation",
    "goldfish 25 %",
    "DP-SGD (8, 1e-05)",
    "dual",
    *STOPS,
}
KINDS = {"reference alone", "plain", "goldfish 25 %", "DP-SGD (8, 1e-05)", "dual"}
FROM = "from reference then auxiliary"
ALL_AUXILIARY = {
    "reference, then auxiliary",
    "dual, reference then auxiliary",
    f"dual, {FROM}",
    f"plain, {FROM}",
    *(f"plain, {FROM}, step {step}" for step in range(1, 7)),
    "dual, cross-fitted",
}
INTERPOLATED = {"dual_plus", "dual_plus, limit 0.55", "plain, interpolated"}
STOPPED_BY_LIMIT = {
    f"{row}, stopped by the limit {limit}" for row in (f"plain, {FROM}", "dual, cross-fitted") for limit in (0.53, 0.55)
}
PLUS = {"plain, best on validation", *STOPS, *ALL_AUXILIARY, *INTERPOLATED, *STOPPED_BY_LIMIT}
BASELINES = {
    "plain, one epoch",
    f"plain, one epoch, {FROM}",
    "plain, weight_decay 1",
    "plain, learning_rate 0.0003",
    "LoRA, plain, dropout 0",
    "LoRA, plain, dropout 0.3",
    "DP-SGD (100, 1e-05)",
    "DP-SGD (1000, 1e-05)",
    "DP-SGD, clipped without noise",
    f"DP-SGD (8, 1e-05), {FROM}",
    "DP-SGD (8, 1e-05), LoRA",
    "selective, base as reference (ssToken's loss part)",
    f"dual, unlearned by confidence, {FROM}",
    f"cross-fitted soft labels, {FROM}",
    f"public student of plain, {FROM}",
}
FURTHER = {f"{row}, further attacks" for row in KINDS | INTERPOLATED}
PRETRAINED = {f"{row}, from scratch" for row in ("reference alone", "plain", "dual")}
Module = Callable[[str], Any]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Return what imports a module of the tool, whose folder is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    command = python("tools/reproduce_paper.py", "--scale", "smoke", "--folder", folder, "--jobs", "2")
    return subprocess.run(
        [*command, "--parts", *PARTS],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_row_is_trained_attacked_and_put_beside_the_papers(tmp_path: Path) -> None:
    first = reproduce(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((tmp_path / "results.json").read_text())["sotu"]
    assert results.keys() == HEADLINE | PLUS | FURTHER | BASELINES | PRETRAINED
    for row in results.values():
        assert {"perplexity", "strongest", "loss", "ref", "min_k", "zlib", "ref_classifier", "ref_forest"} <= row.keys()
    for row in FURTHER:
        assert {"info_rmia", *names_of("rerun")} <= results[row].keys()
    assert results["plain"]["perplexity"][0] < results["base"]["perplexity"][0], "plain training learned nothing"
    assert results["plain"]["perplexity"] != results["plain, step 2"]["perplexity"]
    assert results["plain, best on validation"]["perplexity"][0] in {
        results[row]["perplexity"][0] for row in ("plain", *STOPS)
    }
    table = (tmp_path / "results.md").read_text()
    assert f"| plain | 1 | {results['plain']['perplexity'][0]:.1f} (21.861) |" in table
    assert "In brackets the paper's figure: GPT-2 124M, CC-news" in table
    null = json.loads((tmp_path / "sotu-0" / "audit-headline" / "audit" / "audit.json").read_text())["checks"]
    assert null["null_model"]["name"] == "base"
    assert f"p = {null['null_model']['p_value']:.3f} |" in table
    assert re.search(r"\| sotu-0/dp-sgd-8 \| \((7\.9\d|8), 1e-05\)-DP per document after", table)
    assert "## sotu-0, tokens of the dual run" in table
    assert "## sotu-0-pretraining, time of the steps" in table
    assert (tmp_path / "trade-off-sotu.svg").stat().st_size > 1000
    assert "| strongest attack with a reference, two-sided AUC | the first | more |" in table
    assert re.search(r"\| sotu-0, headline \| as_many [\d.]+, more [\d.]+ \|", table)
    own = json.loads((tmp_path / "sotu-0" / "attacker-1" / "manifest.json").read_text())["splits"]
    split = json.loads((tmp_path / "sotu-0" / "data" / "manifest.json").read_text())["splits"]
    assert own["attack_reference"]["documents"] == split["train"]["documents"]

    taken = [json.loads(mark.read_text()) for mark in tmp_path.glob("*/done/*")]
    assert all(step["processor"] > 0 for step in taken)
    trainings = [step["processor"] for step in taken if step["verb"] == "train"]
    assert f"| train | {len(trainings)} | {sum(trainings) / 60:.1f} |" in table

    steps = len(list(tmp_path.glob("*/done/*")))
    (tmp_path / "sotu-0-pretraining" / "done" / "audit-pretraining").unlink()  # as if it had been stopped there
    again = reproduce(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.startswith(f"[{steps}/{steps}] sotu-0-pretraining/audit-pretraining"), "a step was done again"
    assert json.loads((tmp_path / "results.json").read_text())["sotu"] == results


@pytest.mark.slow
def test_a_failed_step_ends_the_tool_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "base-sotu").mkdir()
    (tmp_path / "base-sotu" / "data").write_text("a file where a folder must be")
    outcome = reproduce(tmp_path)
    assert outcome.returncode == 1
    assert "base-sotu/prepare failed with status 2; see" in outcome.stderr
    assert (tmp_path / "base-sotu" / "logs" / "prepare.log").is_file()


@pytest.mark.parametrize(
    ("scale", "model", "steps"),
    [
        ("smoke", None, 206),
        ("cpu", None, 773),
        ("pretrained", "smollm2", 717),
        ("gpu", "gpt2", 717),
        ("gpu", "llama-2-7b-lora", 717),
    ],
)
def test_the_steps_of_every_part_have_sound_settings_and_needs(
    module: Module, tmp_path: Path, scale: str, model: str | None, steps: int
) -> None:
    """Every run file is parsed as it is written; what a step needs is a step."""
    tool = module("reproduce_paper")
    chosen = tool.SCALES[scale]
    if model is not None:  # a folder with a configuration, for there may be no hub
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "vocab_size": 32000}')
        chosen = tool.with_model(chosen, model) if scale == "gpu" else chosen
        chosen = dataclasses.replace(chosen, model={"path": str(tmp_path / "model")})
    planned = tool.plan(chosen, tmp_path / "runs", list(tool.PARTS), None)[1]
    names = {step.name for step in planned}
    assert {need for step in planned for need in step.needs if need not in names} == set()
    assert len(names) == steps
    scripts = {f"tools/paper/{name}.py" for name in ("distil", "dynamics", "mix", "subset")}
    assert {step.arguments[0] for step in planned} == {
        "audit",
        "export",
        "prepare",
        "interpolate",
        "score",
        "train",
        *scripts,
    }
    if model == "llama-2-7b-lora":
        run = yaml.safe_load((tmp_path / "runs" / "wikipedia-0" / "dual.yaml").read_text())
        assert run["model"] == {"path": str(tmp_path / "model"), "lora": {"rank": 16, "alpha": 32}}


def test_a_part_alone_is_planned_with_what_it_needs_and_nothing_else(module: Module, tmp_path: Path) -> None:
    tool = module("reproduce_paper")
    planned = tool.plan(tool.SCALES["cpu"], tmp_path, ["longer"], ["sotu-0", "sotu-1"])[1]
    trained = {step.name for step in planned if step.arguments[0] == "train"}
    models = ("reference", *tool.SCALES["cpu"].attackers, "longer plain", "longer dual")
    assert trained == {"base-sotu/train", *(f"sotu-0/train {model}" for model in models)}
    assert [step.name for step in planned if step.arguments[0] == "audit"] == ["sotu-0/audit-longer"]
    planned = tool.plan(tool.SCALES["cpu"], tmp_path, ["frontier"], ["sotu-0"])[1]
    assert {"interpolate", "dual all"}.isdisjoint(
        word for step in planned for word in (step.arguments[0], step.name[13:])
    )
    assert "sotu-0/train cross-fitted" in {step.name for step in planned}


def test_what_was_planned_is_not_planned_anew_with_other_settings(module: Module, tmp_path: Path) -> None:
    tool = module("reproduce_paper")
    scale = tool.SCALES["cpu"]
    changed = dataclasses.replace(scale, fine_tuning={**scale.fine_tuning, "learning_rate": 2e-3})
    for _ in range(2):
        tool.plan(scale, tmp_path, ["headline"], ["sotu-0"])
    with pytest.raises(SystemExit, match=r"sotu-0/\w+\.yaml: was planned with other settings; remove it if it has not"):
        tool.plan(changed, tmp_path, ["headline"], ["sotu-0"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cells", "sotu-9"], "--cells: no cell 'sotu-9'; there are sotu-0, wikipedia-0"),
        (["--full"], "--full: has no effect without --scale pretrained"),
        (["--parts", "longer", "--cells", "sotu-1"], "--parts: longer is for the cell sotu-0 alone"),
    ],
)
def test_a_choice_without_effect_is_an_error(
    module: Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--scale", "cpu", "--folder", "never", *arguments])
    with pytest.raises(SystemExit):
        module("reproduce_paper").main()
    assert said in capsys.readouterr().err


def rows_of(module: Module, figures: dict[str, dict[str, dict[int, float]]]) -> Any:
    """Return a table: row -> name of a figure -> its values by seed."""
    figure = module("paper.figures").Figure
    return {row: {name: figure(values) for name, values in found.items()} for row, found in figures.items()}


def test_a_claim_compares_the_seeds_that_both_rows_have(module: Module) -> None:
    """One of the two may not have been audited yet under a seed."""
    values = {"dual": {0: 9.0, 1: 3.0}, "reference alone": {1: 4.0, 2: 1.0}, "plain": {2: 1.0}}
    table = rows_of(module, {row: {"perplexity": found} for row, found in values.items()})
    shown = [
        list(module("paper.claims").better(table, "dual", other))
        for other in ("reference alone", "plain", "no such row")
    ]
    assert shown == [["| perplexity of dual below that of reference alone (ratio 0.750) | 1 of 1 seeds |"], [], []]


def test_plain_training_is_stopped_in_each_seed_before_it_is_recognised(module: Module) -> None:
    def row(perplexity: tuple[float, float], strongest: tuple[float, float]) -> dict[str, dict[int, float]]:
        return {"perplexity": dict(enumerate(perplexity)), "strongest": dict(enumerate(strongest))}

    table = rows_of(
        module,
        {
            "base": row((20.0, 20.0), (0.5, 0.5)),
            "plain, step 2": row((12.0, 12.0), (0.57, 0.6)),
            "plain, step 4": row((8.0, 8.0), (0.7, 0.7)),
            "dual_plus": row((9.0, 22.0), (0.5, 0.5)),
            "reference, then auxiliary": row((18.0, 44.0), (0.5, 0.5)),
            "plain, from reference then auxiliary, step 1": row((16.0, 16.0), (0.6, 0.58)),
            "dual, cross-fitted, at w = 0.1": row((12.0, 17.0), (0.57, 0.57)),
            "dual, cross-fitted, at w = 0.2": row((9.0, 12.0), (0.6, 0.57)),
            "dual, cross-fitted, at w = 0.2, by 8 dual shadows": row((9.0, 12.0), (0.5, 0.5)),
        },
    )
    claims = list(module("paper.claims").claims(table))
    claim = "perplexity of dual_plus below that of {}, stopped while its strongest attack is at most 0.58 (ratio {})"
    # 9 / 12, for the first stop is quiet in this seed, and 22 / 20, for not even that one is
    assert f"| {claim.format('plain', '0.925 ± 0.247')} | 1 of 2 seeds |" in claims
    # 9 / 18 and 22 / 16, for in the first seed the model had to stop before it began
    assert f"| {claim.format('plain, from reference then auxiliary', '0.938 ± 0.619')} | 1 of 2 seeds |" in claims
    [furthest] = [line for line in claims if "the best of the models" in line and "below that of plain, from" in line]
    assert furthest.endswith("(ratio 0.708 ± 0.059) | 2 of 2 seeds |")  # 12 / 18 and 12 / 16


def test_stronger_attackers_are_held_to_the_claims_and_left_out_of_the_plot(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    strongest = {
        "dual": 0.55,
        "dual, by 8 dual shadows": 0.61,
        "dual, cross-fitted, reference known": 0.7,
        "dual_plus, reference known": 0.6,
        "dual_plus, further attacks": 0.57,
        "selective": 0.9,
        "dual, cross-fitted, at w = 0.1": 0.55,
    }
    table = rows_of(
        module,
        {
            row: {"perplexity": {0: 9.0}, "strongest": {0: value}, "collections 50": {0: 0.5}, "ref": {0: 0.5}}
            for row, value in strongest.items()
        },
    )
    lines = [line.split(" | ") for line in module("paper.claims").claims(table)]
    assert {line[0]: line[1] for line in lines if "strongest attack on" in line[0]} == {
        "| strongest attack on dual, two-sided, at most 0.58": "1 of 1 seeds |",
        "| strongest attack on dual, by 8 dual shadows, two-sided, at most 0.58": "0 of 1 seeds |",
        "| strongest attack on dual_plus, reference known, two-sided, at most 0.58": "0 of 1 seeds |",
        "| strongest attack on dual_plus, further attacks, two-sided, at most 0.58": "1 of 1 seeds |",
    }
    module("paper.tables").trade_off(table, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<!-- selective -->" in drawn
    assert "<!-- dual -->" in drawn
    assert not any(under in drawn for under in ("shadows", "known", "further", "at w"))


def test_a_row_has_the_better_of_both_tests_of_collections_and_both_sides_of_lira(module: Module) -> None:
    def attack(name: str, auc: float, tpr: float | None) -> dict[str, Any]:
        rates = [{"target_fpr": 0.1, "tpr": {"value": 1.0}}, {"target_fpr": 0.01, "tpr": tpr and {"value": tpr}}]
        return {"name": name, "auc": {"value": auc}, "tpr": rates}

    tests = [
        {"size": 10, "p_holm": 0.4, "rejected": 0.1},
        {"size": 10, "p_holm": 0.03, "rejected": 0.3},
        {"size": 50, "p_holm": 1.0, "rejected": 0.0},
    ]
    attacks = [attack("ref", 0.5, 0.02), attack("lira", 0.34, 0.03), attack("lira_offline", 0.65, None)]
    entry = {
        "seed": 0,
        "perplexity_non_members": 9.0,
        "strongest": {"auc_two_sided": {"value": 0.66}},
        "loss_gap": 0.1,
        "collections": tests,
        "attacks": attacks,
    }
    other = {**entry, "attacks": [attack("ref", 0.5, 0.02)], "collections": []}
    tables, figures_of = module("paper.tables"), module("paper.figures").figures_of
    table = {"dual_plus": figures_of([entry]), "dual": figures_of([other])}
    assert list(tables.tpr_table(table)) == [
        "| TPR at FPR .01 (the paper's are not known here) | Loss | Ref | Min-K% | Zlib |",
        "|---|---|---|---|---|",
        "| dual_plus | n/a | 0.020 | n/a | n/a |",
        "| dual | n/a | 0.020 | n/a | n/a |",
    ]
    assert list(tables.all_attacks(table)) == [
        "| AUC | LiRA | LiRA out |",
        "|---|---|---|",
        "| dual_plus | 0.340 | 0.650 |",
        "| dual | n/a | n/a |",
    ]
    assert list(tables.collections(table))[2:] == [
        "| dual_plus | 0.030 | 0.300 | 1.000 | 0.000 |",
        "| dual | n/a | n/a | n/a | n/a |",
    ]


def test_the_strongest_attack_is_shown_with_each_of_the_attackers_references(module: Module) -> None:
    values = {"loss": 0.9, "ref": 0.4, "ref_forest": 0.55, "lira": 0.95, "ref@many": 0.7, "ref_forest@many": 0.2}
    attacks = [{"name": name, "auc": {"value": auc}, "tpr": []} for name, auc in values.items()]
    entry = {
        "seed": 0,
        "perplexity_non_members": 9.0,
        "strongest": {"auc_two_sided": {"value": 0.95}},
        "loss_gap": 0.1,
        "collections": [],
        "attacks": attacks,
    }
    row = module("paper.figures").figures_of([entry])
    assert list(module("paper.tables").by_reference({"plain": row})) == [
        "| strongest attack with a reference, two-sided AUC | the first | many |",
        "|---|---|---|",
        "| plain | 0.600 | 0.800 |",
    ]
    entry["attacks"] = attacks[:4]
    assert list(module("paper.tables").by_reference({"plain": module("paper.figures").figures_of([entry])})) == []


def test_rows_of_old_folders_have_the_present_names(module: Module, tmp_path: Path) -> None:
    """An audit of version 0.1 stands in the table, and so in the claims, under the names of today."""
    entry = {
        "perplexity_non_members": 9.0,
        "strongest": {"auc_two_sided": {"value": 0.66}},
        "loss_gap": 0.1,
        "collections": [],
        "attacks": [],
    }
    rows = {
        "plain, taken back, by 8 dual (from reference then probe) shadows": (
            "plain, interpolated, by 8 dual (from reference then auxiliary) shadows"
        ),
        "reference, then probe": "reference, then auxiliary",
        "dual": "dual",
    }
    file = tmp_path / "audit-plus" / "audit" / "audit.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"models": [{"name": row, **entry} for row in rows]}))
    cell = SimpleNamespace(folder=tmp_path, corpus="sotu", seed=0)
    assert list(module("paper.figures").collect([cell])["sotu"]["plus"]) == list(rows.values())


def test_a_mixed_model_lies_between_the_two(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("start", 1.0), ("end", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
    start, end, target = (str(tmp_path / name) for name in ("start", "end", "target"))
    monkeypatch.setattr(sys, "argv", ["mix.py", start, end, "0.25", target])
    module("paper.mix").main()
    assert torch.equal(load_file(tmp_path / "target" / "model.safetensors")["weight"], torch.full((2,), 1.5))


class TwoWeights(torch.nn.Module):
    """Logits (w0 x, w1 y) of two classes, so that gradients are known in closed form."""

    def __init__(self, x: list[float], y: list[float]) -> None:
        super().__init__()
        self.x, self.y = torch.tensor(x), torch.tensor(y)
        self.w = torch.nn.Parameter(torch.tensor([0.8, -0.4]))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack([self.w[0] * self.x, self.w[1] * self.y], dim=-1)[None])


def test_the_cosine_of_the_two_gradients_is_that_of_a_model_worked_out_by_hand(module: Module) -> None:
    inputs = [0.5, -1.0, 2.0, 0.3], [1.0, 0.2, -0.7, 1.5]
    hard, ids = torch.tensor([[True, True, False, False]]), torch.zeros(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "position_ids": ids, "labels": torch.tensor([[0, 1, 1, 0]])}
    outcome = SimpleNamespace(weights=SimpleNamespace(hard=hard, memorized=~hard))
    judged = module("paper.dynamics").judge(TwoWeights(*inputs), lambda losses, batch: outcome, [batch])

    x, y, label = np.array(inputs[0]), np.array(inputs[1]), np.array([0, 1, 1, 0])
    p_1 = 1 / (1 + np.exp(0.8 * x + 0.4 * y))
    gradients = np.stack([((1 - p_1) - (label == 0)) * x, (p_1 - (label == 1)) * y], axis=1)
    learned, unlearned = gradients[:2].mean(axis=0), gradients[2:].mean(axis=0)
    expected = learned @ unlearned / np.linalg.norm(learned) / np.linalg.norm(unlearned)
    assert judged["cosines"] == pytest.approx([expected], rel=1e-5)
    assert torch.equal(judged["hard"], hard)
