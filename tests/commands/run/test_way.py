"""Which steps a run file leads to: what it names is used, what it leaves out is made, and nothing is typed twice."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.commands.run.start import command_of, shown
from dualtok.commands.run.step import override
from dualtok.config.load import load_run, parse_with_overrides
from dualtok.errors import ConfigError
from tests.commands.run.support import settings, steps
from tests.support import write_run

if TYPE_CHECKING:
    from pathlib import Path


def test_the_dual_loss_needs_a_reference_its_scores_and_an_attacker(tmp_path: Path) -> None:
    way = steps(tmp_path)
    assert list(way) == [
        "prepare",
        "reference",
        "reference-export",
        "attack_reference",
        "attack_reference-export",
        "score",
        "dual",
        "dual-export",
        "audit",
        "report",
    ]
    reference, dual = way["reference"].run, way["dual"].run
    assert (reference.objective, reference.train.split, reference.reference) == ("causal_lm", "reference", None)
    assert way["score"].run.reference == dual.reference
    assert (
        dual.reference.model == str(tmp_path / "out" / "models" / "reference") == str(way["reference-export"].product)
    )
    assert way["audit"].run.audit.models == {
        name: str(tmp_path / "out" / "models" / folder)
        for name, folder in (("reference alone", "reference"), ("dual", "dual"))
    }
    assert way["audit"].run.audit.attack_reference == str(way["attack_reference-export"].product)
    assert way["report"].run.audit.runs == {"dual": str(tmp_path / "out" / "dual")}


def test_plain_training_joins_where_it_is_asked_for_with_both_checkpoints(tmp_path: Path) -> None:
    way = steps(tmp_path, workflow={"plain": True, "checkpoints": ["best", "latest"]}, selection={"alpha": 0.5})
    assert list(way["audit"].run.audit.models) == [
        "reference alone",
        "plain, stopped early",
        "plain, last",
        "dual, best",
        "dual, last",
    ]
    assert way["plain"].run.selection is None
    assert way["plain"].run.reference == way["dual"].run.reference, "it monitors the Ref attack"
    assert way["dual-last-export"].options == ("--checkpoint", "latest")
    with pytest.raises(ConfigError, match=r"workflow.plain: has no effect with objective 'causal_lm'"):
        steps(tmp_path, objective="causal_lm", workflow={"plain": True})


def test_settings_that_differ_for_the_reference_replace_those_of_the_file(tmp_path: Path) -> None:
    way = steps(tmp_path, workflow={"reference": {"epochs": 6, "learning_rate": 0.1}})
    trained = way["reference"].run.train
    assert (trained.epochs, trained.steps, trained.learning_rate) == (6, None, 0.1)
    assert (way["dual"].run.train.steps, way["attack_reference"].run.train.steps) == (2, 2)
    with pytest.raises(ConfigError, match=r"workflow.reference: 'epoch' .* \(did you mean 'epochs'\?\)"):
        steps(tmp_path, workflow={"reference": {"epoch": 6}})


def test_a_reference_and_an_attacker_that_are_named_are_not_trained(tmp_path: Path) -> None:
    way = steps(tmp_path, reference={"model": "own"}, audit={"attack_reference": "theirs", "models": {"other": "m"}})
    assert list(way) == ["prepare", "score", "dual", "dual-export", "audit", "report"]
    assert way["score"].contents == ("own",)
    assert list(way["audit"].run.audit.models) == ["dual", "other"]
    with pytest.raises(ConfigError, match=r"audit.models: 'dual' is a row of `dualtok run` itself"):
        steps(tmp_path, audit={"models": {"dual": "m"}})


def test_a_live_reference_is_trained_and_not_scored(tmp_path: Path) -> None:
    way = steps(tmp_path, workflow={}, reference={"mode": "resident", "batch_size": 4})
    assert "score" not in way
    assert (way["dual"].run.reference.mode, way["dual"].run.reference.batch_size) == ("resident", 4)
    assert "reference-export" in way["dual"].needs


def test_the_base_of_adapters_may_be_the_reference(tmp_path: Path) -> None:
    model = {"path": "base", "lora": {"rank": 4}}
    way = steps(tmp_path, model=model, reference={"mode": "adapter"})
    assert not {"reference", "score"} & set(way)
    assert way["dual-export"].options == ("--merge",)
    audit = way["audit"].run.audit
    assert (audit.models["base"], audit.null_model) == ("base", "base")


def test_dual_plus_is_cross_fitted_and_interpolated(tmp_path: Path) -> None:
    shares = {"train": 0.4, "reference": 0.1, "auxiliary": 0.1, "validation": 0.1, "held_out": 0.1}
    data = {**settings(tmp_path)["data"], "shares": shares}
    way = steps(tmp_path, objective="dual_plus", data=data, workflow={}, interpolate={"auc": 0.55})
    trained = {name: step.run for name, step in way.items() if step.verb == "train"}
    assert list(trained) == ["first", "reference", "surrogate", "fold-0", "fold-1", "dual_plus"]
    models = tmp_path / "out" / "models"
    assert [run.train.split for run in trained.values()] == ["reference", "auxiliary", "auxiliary", *["train"] * 3]
    starts = [run.model.path for run in trained.values()]
    assert starts == [None, str(models / "first"), None, *[str(models / "reference")] * 3]
    assert [trained[f"fold-{fold}"].train.leave_out.fold for fold in range(2)] == [0, 1]
    assert trained["dual_plus"].reference.folds == (str(models / "fold-0"), str(models / "fold-1"))
    last = way["interpolate"].run.interpolate
    assert (last.reference, last.surrogate_reference) == (str(models / "reference"), str(models / "surrogate"))
    assert last.auc == 0.55
    assert way["audit"].run.audit.models["dual_plus"] == str(way["interpolate"].product)


def test_dual_plus_of_scales_trains_its_reference_whole_and_no_folds(tmp_path: Path) -> None:
    shares = {"train": 0.4, "reference": 0.1, "auxiliary": 0.1, "attack_reference": 0.1, "held_out": 0.1}
    data = {**settings(tmp_path)["data"], "shares": shares}
    changes = {"objective": "dual_plus", "data": data, "model": {"path": "base", "ia3": {}}}
    way = steps(tmp_path, **changes, workflow={"reference": {"learning_rate": 1e-5}})
    trained = {name: step.run for name, step in way.items() if step.verb == "train"}
    assert list(trained) == ["first", "reference", "surrogate", "attack_reference", "dual_plus"]
    assert [run.model.ia3 is None for run in trained.values()] == [True, True, True, True, False]
    assert [run.train.learning_rate for run in trained.values()] == [1e-5, 1e-5, 1e-5, 1e-5, 5e-3]
    assert trained["dual_plus"].model.path == str(tmp_path / "out" / "models" / "reference")
    assert "score" not in way
    assert way["reference-export"].options == ()
    with pytest.raises(ConfigError, match=r"workflow.reference: needs a learning_rate"):
        steps(tmp_path, **changes, workflow={})


@pytest.mark.parametrize(("name", "value"), [("folds", ["a", "b"]), ("model", "m")])
def test_dual_plus_trains_its_own_reference(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"reference.{name}: `dualtok run` trains and scores it"):
        steps(tmp_path, objective="dual_plus", workflow={}, reference={name: value})


def test_an_audit_alone_is_two_steps(tmp_path: Path) -> None:
    texts = {"members": {"source": "a.jsonl"}, "non_members": {"source": "b.jsonl"}}
    way = steps(tmp_path, model=None, train=None, objective="causal_lm", audit={"models": {"m": "model"}, **texts})
    assert list(way) == ["audit", "report"]
    assert way["audit"].contents == ("model", "a.jsonl", "b.jsonl")
    with pytest.raises(ConfigError, match=r"nothing to do"):
        steps(tmp_path, model=None, train=None)


def test_a_split_that_a_step_needs_must_be_there(tmp_path: Path) -> None:
    data = {**settings(tmp_path)["data"], "shares": {"train": 0.5, "held_out": 0.1}, "tokenizer": "own"}
    with pytest.raises(ConfigError, match=r"data.shares.reference: missing"):
        steps(tmp_path, data=data)
    assert "attack_reference" not in steps(tmp_path, data=data, objective="causal_lm")
    with pytest.raises(ConfigError, match=r"data.source: missing"):
        steps(tmp_path, data={"dir": str(tmp_path / "nothing")})


def test_each_command_by_itself_has_the_settings_of_its_step(tmp_path: Path) -> None:
    """What --dry-run prints can be typed, and does what `dualtok run` does."""
    tree = settings(tmp_path, workflow={"plain": True})
    file = write_run(tmp_path / "run.yaml", tree.pop("data"), **tree)
    for step in steps(tmp_path, workflow={"plain": True}).values():
        words = shlex.split(shown(step).replace(str(tmp_path / "run.yaml"), str(file)))
        assert words[:2] == ["dualtok", step.verb]
        if step.verb != "export":
            overrides = [word for word in words[3:] if not word.startswith("--")]
            assert load_run(file, overrides) == step.run, step.name


@pytest.mark.parametrize(
    "value", ["a b", "null", "1", "x: y", "#", "é", None, 1e-5, {"a": ["b", None]}, "models/a-1.b"]
)
def test_an_override_is_read_back_as_it_was(value: Any) -> None:
    tree = {"data": {"dir": "s3://bucket/d"}}
    run = parse_with_overrides(tree, [override("data.stream.storage_options", {"k": value})], "x")
    assert run.data.stream.storage_options == {"k": value}
    if isinstance(value, str):
        run = parse_with_overrides({"data": {"dir": "d"}}, [override("data.source", value)], "x")
        assert run.data.source == value


@pytest.mark.parametrize(
    ("workflow", "start"),
    [
        ({"launcher": "torchrun", "ranks": 3}, "torchrun --nproc-per-node 3 -m dualtok train "),
        ({"launcher": "deepspeed", "ranks": 3}, "deepspeed --num_gpus 3 --module dualtok train "),
        (
            {"launcher": "slurm", "nodes": 2, "ranks": 4},
            "dualtok launch --backend slurm --nodes 2 --gpus 4 --verb train ",
        ),
        ({"launcher": "mpi", "ranks": 4}, "dualtok launch --backend mpi --gpus 4 --verb train "),
    ],
)
def test_ranks_share_what_can_be_shared(tmp_path: Path, workflow: dict[str, Any], start: str) -> None:
    way = steps(tmp_path, workflow=workflow)
    assert shown(way["dual"]).startswith(start)
    assert shown(way["prepare"]).startswith("dualtok prepare ")
    assert shown(way["dual-export"]).startswith("dualtok export ")


def test_ranks_are_processes_and_never_forks(tmp_path: Path) -> None:
    way = steps(tmp_path, workflow={"launcher": "torchrun", "ranks": 2})
    command = command_of(way["dual"])
    assert command is not None
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_slurm_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    way = steps(tmp_path, workflow={"launcher": "slurm", "ranks": 2, "nodes": 2})
    command = command_of(way["dual"])
    folder = tmp_path / "out" / "dual" / "launch"
    assert command == ["sbatch", "--wait", str(folder / "slurm_ranks.sbatch")]
    assert "train" in (folder / "slurm_ranks.sbatch").read_text()


def test_a_launcher_that_cannot_start_all_hosts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workflow.nodes: torchrun has to be started on every host"):
        steps(tmp_path, workflow={"launcher": "torchrun", "nodes": 2})
    with pytest.raises(ConfigError, match=r"workflow.ranks: has no effect without a launcher"):
        steps(tmp_path, workflow={"ranks": 2})
