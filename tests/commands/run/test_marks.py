"""What a step's mark is compared with: a result of other settings or other inputs does not count."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.commands.run.estimate import seconds_left
from dualtok.commands.run.marks import PIECE, WHOLE, Marks, content
from dualtok.commands.run.run import Way
from dualtok.errors import ConfigError, DataError
from tests.commands.run.support import settings, steps
from tests.support import own_copy

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.commands.run.step import Step


def finish(step: Step, folder: Path, made: dict[str, str | None] | None = None) -> str:
    """Leave a step as if it had been done; returns which result there is."""
    mark = Marks(folder).state(step, made or {}).mark
    Marks(folder).write(step, dataclasses.replace(mark, finished=True, seconds=2.0))
    if step.product is not None:
        place = step.product / "step-000002" / "COMPLETE" if step.verb == "train" else step.product
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    return mark.made


def test_a_finished_step_is_done_and_its_result_must_be_there(tmp_path: Path) -> None:
    step = steps(tmp_path)["reference"]
    marks = Marks(tmp_path / "out")
    assert not marks.state(step, {}).begun
    finish(step, tmp_path / "out")
    assert marks.state(step, {}).done
    assert step.product is not None
    step.product.rename(tmp_path / "elsewhere")
    state = marks.state(step, {})
    assert not state.done
    assert not state.stale


def test_another_setting_makes_it_stale_and_is_named(tmp_path: Path) -> None:
    finish(steps(tmp_path)["reference"], tmp_path / "out")
    changed = settings(tmp_path)["train"] | {"learning_rate": 0.1}
    state = Marks(tmp_path / "out").state(steps(tmp_path, train=changed)["reference"], {})
    assert not state.done
    assert state.stale == ("train.learning_rate was 0.005, now 0.1",)


@pytest.mark.parametrize(
    "changes",
    [
        {"monitor": {"log_every": 3}},
        {"workflow": {"launcher": "torchrun", "ranks": 2}},
        {"audit": {"seed": 3}},
        {"launch": {"port": 4000}},
    ],
)
def test_settings_that_change_nothing_of_it_leave_it_done(tmp_path: Path, changes: dict[str, Any]) -> None:
    finish(steps(tmp_path)["reference"], tmp_path / "out")
    assert Marks(tmp_path / "out").state(steps(tmp_path, **changes)["reference"], {}).done


def test_another_input_makes_it_stale(tmp_path: Path) -> None:
    way = steps(tmp_path)
    finish(way["dual"], tmp_path / "out", {"prepare": "a", "score": "b"})
    marks = Marks(tmp_path / "out")
    assert marks.state(way["dual"], {"prepare": "a", "score": "b"}).done
    assert marks.state(way["dual"], {"prepare": None, "score": "b"}).done, "nothing is known of it yet"
    assert marks.state(way["dual"], {"prepare": "a", "score": "c"}).stale == ("score is another one now",)


def test_a_mark_of_an_earlier_version_lacks_settings_that_are_at_their_default(tmp_path: Path) -> None:
    step = steps(tmp_path)["reference"]
    finish(step, tmp_path / "out")
    file = tmp_path / "out" / "steps" / "reference.json"
    mark = json.loads(file.read_text())
    del mark["settings"]["train.weight_decay"]
    file.write_text(json.dumps(mark))
    assert Marks(tmp_path / "out").state(step, {}).done
    changed = settings(tmp_path)["train"] | {"weight_decay": 0.2}
    assert Marks(tmp_path / "out").state(steps(tmp_path, train=changed)["reference"], {}).stale
    file.write_text("{}")
    with pytest.raises(DataError, match=r"reference.json: malformed; remove it"):
        Marks(tmp_path / "out").state(step, {})


def test_training_that_failed_before_its_first_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    step = steps(tmp_path)["reference"]
    marks = Marks(tmp_path / "out")
    marks.write(step, marks.state(step, {}).mark)
    smaller = steps(tmp_path, train=settings(tmp_path)["train"] | {"batch_size": 4})["reference"]
    assert not marks.state(smaller, {}).stale
    assert step.product is not None
    (step.product / "step-000001").mkdir(parents=True)
    (step.product / "step-000001" / "COMPLETE").touch()
    assert marks.state(smaller, {}).stale == ("train.batch_size was 8, now 4",)


def test_what_can_be_made_again_gives_the_same_result_and_training_another_one(tmp_path: Path) -> None:
    way, marks = steps(tmp_path), Marks(tmp_path / "out")
    assert marks.state(way["score"], {}).mark.made == marks.state(way["score"], {}).mark.made
    assert marks.state(way["dual"], {}).mark.made != marks.state(way["dual"], {}).mark.made


def test_files_and_folders_are_told_by_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = content(str(folder))
    (folder / "a").write_text("2")
    assert content(str(folder)) != first
    (folder / "a").rename(folder / "b")
    assert len({first, content(str(folder)), content("org/model")}) == 3
    assert content("org/model") == "org/model"


def test_a_change_at_the_end_of_a_large_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as stream:
        stream.truncate(WHOLE + 10 * PIECE)
    first = content(str(file))
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert content(str(file)) != first


def test_all_stale_training_runs_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("x\n")
    way = list(steps(tmp_path).values())
    for step in way[1:3]:
        finish(step, tmp_path / "out")
    changed = list(steps(tmp_path, seed=5).values())
    with pytest.raises(ConfigError, match=r"'reference' .seed was 0, now 5.*--redo.*replaced"):
        Way(changed, tmp_path / "out", "dualtok run run.yaml").carry_out()
    assert not (tmp_path / "out" / "logs").exists()


def test_data_that_was_prepared_otherwise_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("x\n")
    finish(steps(tmp_path)["prepare"], tmp_path / "out")
    (tmp_path / "corpus.jsonl").write_text("y\n")
    with pytest.raises(
        ConfigError, match=r"corpus.jsonl is another one now; change that back, choose another data.dir"
    ):
        Way(list(steps(tmp_path).values()), tmp_path / "out", "dualtok run run.yaml", redo=True).carry_out()


def test_the_time_left_follows_from_the_steps_that_are_done(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    data = own_copy(small_corpus, tmp_path / "data")
    way = list(steps(tmp_path, data=data).values())
    names = [step.name for step in way]
    first = names.index("reference")
    assert seconds_left(way, {}, []) is None
    done = way[: first + 1]
    short = seconds_left(way[first + 1 :], {"reference": 10.0}, done)
    long = seconds_left(way[first + 1 :], {"reference": 20.0}, done)
    assert short is not None
    assert long == pytest.approx(2 * short)
    assert short > 10, "two more models of as many steps, and the passes of scores and audit"
    assert way[first].product is not None
    noted = way[first].product.parent / "metrics.jsonl"
    noted.parent.mkdir(parents=True, exist_ok=True)
    noted.write_text("".join(json.dumps({"step": step, "tokens_per_second": 1024.0}) + "\n" for step in (1, 2)))
    started = seconds_left(way[first + 1 :], {"reference": 10.0}, done)
    assert started is not None
    assert started < short, "of 10 s one was computing, and 9 the start"
