"""The reproduction of the paper's tables, in miniature: every step a real command, done once."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dualtok.audit.attacks.registry import names_of
from tests.support import ROOT, environment, python

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tools.conftest import Module

PARTS = ("headline", "plus", "further", "baselines", "dynamics", "pretraining", "lira-scales", "releases", "map")
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
    f"IA3, {FROM}",
    "dual, cross-fitted",
}
INTERPOLATED = {"dual_plus", "dual_plus, limit 0.55", "plain, interpolated"}
STOPPED_BY_LIMIT = {
    f"{row}, stopped by the limit {limit}"
    for row in (f"plain, {FROM}", "dual, cross-fitted", f"IA3, {FROM}")
    for limit in (0.53, 0.55)
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
BY_SHADOWS = {
    f"{row}, by 2 IA3 shadows"
    for row in (f"IA3, {FROM}", *(f"IA3, {FROM}, stopped by the limit {limit}" for limit in (0.53, 0.55)))
}
RELEASED = {f"{row}, first release known" for row in ("plain", f"dual, {FROM}", f"IA3, {FROM}")}
PRETRAINED = {f"{row}, from scratch" for row in ("reference alone", "plain", "dual")}


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
    assert results.keys() == HEADLINE | PLUS | FURTHER | BASELINES | PRETRAINED | BY_SHADOWS | RELEASED
    for name, row in results.items():
        assert {"perplexity", "strongest", "loss", "ref", "min_k", "zlib"} <= row.keys()
        assert ("lira" in row) == (name in BY_SHADOWS)
        assert ("ref_forest" in row) == (name not in BY_SHADOWS | RELEASED), "a forest needs more than a dozen members"
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
    assert "| sotu-0-map-40-0.25-32x2 | dual, 3 epochs |" in table
    assert "| sotu-0-map-80-0.25-32x2 | plain, 10 epochs |" in table
    assert (tmp_path / "map.svg").stat().st_size > 1000
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
        ("smoke", None, 283),
        ("cpu", None, 1578),
        ("pretrained", "smollm2", 752),
        ("gpu", "gpt2", 752),
        ("gpu", "llama-2-7b-lora", 752),
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
