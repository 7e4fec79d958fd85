"""Steps that diverge: every layout leaves out the same ones, does the same about them, and ends alike."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.train.checkpoints.writer import find_checkpoint
from tests.multi_rank.test_elastic_resume import PIPELINE, SHARDED, launch, set_layout
from tests.support import dualtok, history, save_model, succeed, tiny_llama_config, write_run, write_small_corpus

if TYPE_CHECKING:
    from pathlib import Path

STEPS, BROKEN = 10, 5
LAYOUTS = {
    "one": (1, {"zero": 0}),
    "zero3": (2, {"zero": 3}),
    "zero1": (2, {"zero": 1}),
    "pipeline": (2, {"zero": 0, **PIPELINE}),
    "sharded": (2, {"zero": 3, **SHARDED}),
}
CASES: dict[str, dict[str, Any]] = {
    "spike": {"spike_factor": 1.001, "window": 2, "on_spike": "skip", "patience": 9},
    "skip": {"on_nan": "skip"},
    "lower_alpha": {"on_nan": "lower_alpha", "alpha_factor": 0.25},
    "roll_back": {"on_nan": "roll_back"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Train every case in every layout, one launch per number of ranks."""
    folder = tmp_path_factory.mktemp("guard")
    # Whole passages: with these blocks some step is a spike by the tokens of all ranks, and not by those of each.
    corpus = write_small_corpus(folder / "corpus", characters=None)
    reference = save_model(folder / "reference", seed=7, initializer_range=0.1)
    made: dict[tuple[str, str], Path] = {}
    for case, guard in CASES.items():
        for layout, (_, engine) in LAYOUTS.items():
            run = write_run(
                folder / f"{case}-{layout}.yaml",
                corpus,
                seed=5,
                objective="dual",
                model={"config": tiny_llama_config()},
                reference={"model": str(reference)},
                train={
                    "learning_rate": 2e-2,
                    "batch_size": 8,
                    "gradient_accumulation": 2,
                    "steps": STEPS,
                    "precision": "fp32",
                    "checkpoint_every": 3,
                    "guard": guard,
                },
                monitor={"csv": True, "log_every": 1},
            )
            set_layout(run, engine, folder)
            made[case, layout] = run
    succeed(dualtok("score", made["skip", "one"]))
    for ranks in (1, 2):
        # Pipelines last: their stages give parameters other numbers on each rank, which ZeRO-3 compares from then on.
        mine = [(case, made[case, layout]) for layout in LAYOUTS for case in CASES if LAYOUTS[layout][0] == ranks]
        # Beyond the last step, so that nothing is preempted.
        launch(ranks, *(f"{run}:{STEPS + 9}:{0 if case == 'spike' else BROKEN}" for case, run in mine))
    return made


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_leaves_out_the_same_steps(runs: dict[tuple[str, str], Path], case: str) -> None:
    expected = history(runs[case, "one"])
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    for layout in LAYOUTS:
        found = history(runs[case, layout])
        assert [row["left_out"] for row in found] == [row["left_out"] for row in expected], layout
        for row, other in zip(found, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), (layout, row["step"])
            assert row["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-9), (layout, row["step"])


@pytest.mark.slow
def test_what_was_done_shows_in_the_run(runs: dict[tuple[str, str], Path]) -> None:
    left_out = {case: [row["step"] for row in history(runs[case, "one"]) if row["left_out"]] for case in CASES}
    assert left_out["skip"] == left_out["lower_alpha"] == [BROKEN]
    assert left_out["roll_back"] == [], "the broken step was taken again with other blocks"
    assert left_out["spike"], "no step was a spike, so nothing is compared"
    assert all(row["left_out"] in (None, "spike") for row in history(runs["spike", "one"]))

    def state(case: str) -> dict[str, Any]:
        return find_checkpoint(runs[case, "one"].with_suffix("") / "checkpoints").manifest.state

    assert state("lower_alpha")["guard"]["alpha_scale"] == 0.25
    assert state("skip")["guard"]["alpha_scale"] == 1.0
    # The unlearning half weighs less from then on.
    quieter, louder = (history(runs[case, "one"])[BROKEN] for case in ("lower_alpha", "skip"))
    assert quieter["hard_loss"] == louder["hard_loss"]
    assert quieter["loss"] == pytest.approx(quieter["hard_loss"] - 0.2 * quieter["memorized_loss"], rel=1e-3)
    # Back from step 5 to the checkpoint of step 3, with two steps' blocks gone: 4 and 5 were taken twice.
    assert state("roll_back")["samples_seen"] == 8 * (STEPS + 2)
    assert state("skip")["samples_seen"] == 8 * STEPS


@pytest.mark.slow
def test_a_roll_back_leaves_no_step_twice_to_who_watches(runs: dict[tuple[str, str], Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = runs["roll_back", "one"].with_suffix("")
    losses = [row["loss"] for row in history(runs["roll_back", "one"])]
    rows = list(csv.reader((folder / "csv" / "loss_dual.csv").open()))[1:]
    assert [int(step) for step, _ in rows] == list(range(1, STEPS + 1))
    assert [float(loss) for _, loss in rows] == pytest.approx(losses)
    seen = EventAccumulator(str(folder / "events")).Reload().Scalars("loss/dual")
    assert [event.step for event in seen] == list(range(1, STEPS + 1))
    assert [event.value for event in seen] == pytest.approx(losses)
