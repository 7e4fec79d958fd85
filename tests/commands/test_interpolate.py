"""``dualtok interpolate``: the model of the largest weight that keeps to the limit, the same on any number of ranks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.commands.status import read_status
from tests.support import dualtok, error_line, history, own_copy, read_weights, save_model, succeed, write_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_a_trained_model_goes_back_until_its_members_are_hardly_seen(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    reference, surrogate = (
        save_model(tmp_path / name, seed) for name, seed in (("reference", 1), ("surrogate_reference", 2))
    )
    plain = write_run(
        tmp_path / "plain.yaml",
        small_corpus,
        objective="causal_lm",
        model={"path": str(reference)},
        train={"learning_rate": 5e-3, "batch_size": 8, "epochs": 8, "precision": "fp32"},
    )
    succeed(dualtok("train", plain))
    model = tmp_path / "plain.hf"
    succeed(dualtok("export", plain.with_suffix(""), model, "--checkpoint", "latest"))
    settings = {"model": str(model), "reference": str(reference), "surrogate_reference": str(surrogate), "auc": 0.52}
    run = write_run(tmp_path / "back.yaml", {"dir": small_corpus["dir"]}, interpolate=settings)
    shown = succeed(dualtok("interpolate", run, tmp_path / "made"))
    facts = json.loads((tmp_path / "made" / "interpolate.json").read_text())
    trials = {trial["w"]: trial["auc"] for trial in facts["trials"]}
    by_reference = {trial["w"]: trial["auc_with_reference"] for trial in facts["trials"]}
    assert by_reference[1.0] > 0.7, "the model is overfit"
    assert by_reference[facts["w"]] > 0.54, "a short step hides little from who has the reference"
    assert facts["auc_with_reference"] == by_reference[facts["w"]]
    assert f"reaches an AUC of {facts['auc_with_reference']:.3f}" in shown
    assert trials[1.0] > 0.52, "the model gives nothing away, so the test shows nothing"
    assert 0 < facts["w"] < 1
    assert trials[facts["w"]] <= 0.52
    assert min(w for w, auc in trials.items() if auc > 0.52) - facts["w"] < 0.02
    near, far, made = (read_weights(folder) for folder in (reference, model, tmp_path / "made"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, near[name] + facts["w"] * (far[name] - near[name]))

    line = error_line(dualtok("interpolate", run, tmp_path / "made"))
    assert "exists; give another folder" in line
    succeed(dualtok("interpolate", run, tmp_path / "again", f"output_dir={tmp_path / 'again.run'}", ranks=2))
    again = json.loads((tmp_path / "again" / "interpolate.json").read_text())
    assert again["w"] == pytest.approx(facts["w"], abs=0.01)

    # The reference stands in as well: who knows more of each document sees more, so that the model goes further back.
    both = f"interpolate.surrogate_reference=[{surrogate}, {reference}]"
    succeed(dualtok("interpolate", run, tmp_path / "nearer", both))
    assert json.loads((tmp_path / "nearer" / "interpolate.json").read_text())["w"] < 0.8 * facts["w"]


@pytest.mark.slow
def test_a_run_with_objective_dual_plus_is_interpolated_from_what_it_has_trained(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    """Score with both folds' models, train, and interpolate, all by one run file."""
    data = own_copy(small_corpus, tmp_path / "data")
    reference, surrogate = (
        save_model(tmp_path / name, seed) for name, seed in (("reference", 1), ("surrogate_reference", 2))
    )
    folds = [str(save_model(tmp_path / f"fold-{fold}", seed=3 + fold)) for fold in (0, 1)]
    run = write_run(
        tmp_path / "run.yaml",
        data,
        objective="dual_plus",
        model={"path": str(reference)},
        reference={"folds": folds},
        train={"learning_rate": 5e-3, "batch_size": 8, "epochs": 8, "precision": "fp32"},
        interpolate={"reference": str(reference), "surrogate_reference": str(surrogate), "auc": 0.52},
    )
    assert "checkpoints: no checkpoint 'latest'" in error_line(dualtok("interpolate", run, tmp_path / "made"))
    succeed(dualtok("score", run))
    shown = succeed(dualtok("train", run, "train.warmup_steps=2"))
    assert f"until then attacks can tell its members: dualtok interpolate {run} TARGET train.warmup_steps=2" in shown
    assert read_status(run.with_suffix("")).next_command.startswith("dualtok interpolate ")
    assert "has trained on 'auxiliary'" in error_line(
        dualtok("interpolate", run, tmp_path / "made", "train.split=auxiliary")
    )
    assert {row["memorized_tokens"] > 0 for row in history(run)} == {True}, "it unlearns nothing"
    succeed(dualtok("interpolate", run, tmp_path / "made"))
    assert [path.name for path in (run.with_suffix("") / "interpolate").iterdir()] == ["signals"], (
        "trials were left behind"
    )
    w = json.loads((tmp_path / "made" / "interpolate.json").read_text())["w"]
    assert 0 < w < 1
    succeed(dualtok("export", run.with_suffix(""), tmp_path / "trained", "--checkpoint", "latest"))
    near, far, made = (read_weights(tmp_path / name) for name in ("reference", "trained", "made"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, near[name] + w * (far[name] - near[name]))
    cards = [(tmp_path / name / "README.md").read_text() for name in ("trained", "made")]
    before = "these are the trained weights, before `dualtok interpolate`"
    assert [before in card for card in cards] == [True, False]
    assert f"* interpolated towards its reference: {w:.3f} of the way" in cards[1]


@pytest.mark.slow
def test_along_a_run_the_best_checkpoint_within_the_limit_is_taken(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    """Early stopping, where the limit of the attack says when to stop; of learned scales, as dual_plus trains them."""
    reference, surrogate = (
        save_model(tmp_path / name, seed) for name, seed in (("reference", 1), ("surrogate_reference", 2))
    )
    run = write_run(
        tmp_path / "scales.yaml",
        small_corpus,
        objective="dual_plus",
        model={"path": str(reference), "ia3": {}},
        train={
            "learning_rate": 5e-2,
            "batch_size": 8,
            "steps": 240,
            "precision": "fp32",
            "checkpoint_every": 40,
            "checkpoint_keep": 100,
        },
        interpolate={"reference": str(reference), "surrogate_reference": str(surrogate), "along": "run", "auc": 0.9999},
    )
    assert "until then attacks can tell its members" in succeed(dualtok("train", run))
    kept = sorted(path.name for path in (run.with_suffix("") / "checkpoints").glob("step-*"))

    def made(name: str, *overrides: str) -> tuple[dict[str, Any], str]:
        shown = succeed(dualtok("interpolate", run, tmp_path / name, *overrides))
        return json.loads((tmp_path / name / "interpolate.json").read_text()), shown

    facts, _ = made("any")
    trials = facts["trials"]
    assert [f"step-{trial['step']:08d}" for trial in trials] == kept
    assert facts["step"] == min(trials, key=lambda trial: trial["loss"])["step"]
    aucs = sorted(trial["auc"] for trial in trials)
    assert aucs[0] < aucs[2] < aucs[3] < aucs[-1], "the limit decides nothing"
    limit = (aucs[2] + aucs[3]) / 2
    facts, shown = made("within", f"interpolate.auc={limit}")
    best = min((trial for trial in trials if trial["auc"] < limit), key=lambda trial: trial["loss"])["step"]
    assert facts["step"] == best
    assert f"wrote {tmp_path / 'within'}: the checkpoint of step {best}" in shown
    assert f"* stopped early, after step {best}, to keep to" in (tmp_path / "within" / "README.md").read_text()
    succeed(
        dualtok("export", run.with_suffix(""), tmp_path / "exported", "--checkpoint", f"step-{best:08d}", "--merge")
    )
    within, exported = (read_weights(tmp_path / name) for name in ("within", "exported"))
    assert all(torch.equal(tensor, exported[name]) for name, tensor in within.items())

    facts, _ = made("none", "interpolate.auc=0.5001")
    assert (facts["step"], facts["w"]) == (None, 0)
    near = read_weights(reference)
    assert all(torch.equal(tensor, near[name]) for name, tensor in read_weights(tmp_path / "none").items())
    line = error_line(dualtok("interpolate", run, tmp_path / "never", f"interpolate.model={reference}"))
    assert "interpolate.model: has no effect with interpolate.along=run" in line


def test_without_its_section_there_is_nothing_to_do(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.yaml", {"dir": small_corpus["dir"]})
    assert "interpolate" in error_line(dualtok("interpolate", run, tmp_path / "made"))
    nothing_trained = "interpolate={reference: a, surrogate_reference: b}"
    assert "interpolate.model: name the trained" in error_line(
        dualtok("interpolate", run, tmp_path / "made", nothing_trained)
    )
