"""``dualtok plan``: the run files of the repository, the files it writes, and what it refuses."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualtok.cli import app
from dualtok.cli import plan as plan_command
from dualtok.commands.plan.inputs import job_of, material_of
from dualtok.commands.plan.run import make_cluster, plan
from dualtok.commands.plan.write import write_layout
from dualtok.config.load import load_run
from dualtok.errors import ConfigError
from dualtok.plan.hardware import GIB, Cluster
from tests.support import ROOT, dualtok, error_line, history, succeed, tiny_llama_config, write_run

RUNS = ROOT / "launch" / "runs"
BILLIONS = {
    "gpt2": (0.124, 0.124),
    "pythia_1_4b": (1.415, 1.415),
    "llama2_7b_lora": (6.738, 0.040),
    "llama3_8b": (8.030, 8.030),
    "llama2_70b_sharded_pipeline": (68.977, 68.977),
}
"""Run file -> billions of parameters, all and trained."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the run files name ds_configs/ from there


def cluster(**changes: Any) -> Cluster:
    machines = {
        "device": "h100",
        "nodes": 1,
        "gpus": 2,
        "gpu_memory": None,
        "host_memory": "1TB",
        "network": "3200Gb/s",
        **changes,
    }
    return make_cluster(**machines)


def test_every_run_file_is_listed() -> None:
    assert sorted(path.stem for path in RUNS.glob("*.yaml")) == sorted(BILLIONS)


def options_in_the_head(run_file: Path) -> dict[str, Any]:
    """Return the options of the ``dualtok plan`` that a run file's head tells to give, with the command's defaults."""
    [line] = [line for line in run_file.read_text().splitlines() if line.startswith("#   dualtok plan ")]
    file, *words = shlex.split(line.removeprefix("#   dualtok plan "))
    assert Path(file) == run_file.relative_to(ROOT)
    given = {
        name.removeprefix("--"): int(value) if value.isdigit() else value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(plan_command).parameters.items()
        if name in ("device", "nodes", "gpus", "gpu_memory", "host_memory", "network", "tokens")
    }
    assert given.keys() <= known.keys()
    return known | given


@pytest.mark.parametrize("name", BILLIONS)
def test_a_run_file_fits_the_machines_it_names(name: str) -> None:
    parameters, trained = BILLIONS[name]
    machines = options_in_the_head(RUNS / f"{name}.yaml")
    tokens = machines.pop("tokens")
    found = plan(load_run(RUNS / f"{name}.yaml"), make_cluster(**machines), tokens)
    assert found.refused == ""
    assert found.own is not None
    assert found.own.fits
    assert found.shape.parameters / 1e9 == pytest.approx(parameters, abs=0.001)
    assert found.shape.trained / 1e9 == pytest.approx(trained, abs=0.001)
    assert found.options[0].time.total <= 1.03 * found.own.time.total
    assert 0.05 < found.mfu < 0.6
    budget = found.budget
    assert budget.steps is not None
    assert budget.hours == pytest.approx(budget.steps * found.own.time.total / 3600)
    assert budget.checkpoints == 3 * 12 * found.shape.trained  # the last, the best, and one being written
    if name != "llama2_7b_lora":
        assert "adapter" not in found.references
    else:
        assert budget.scores == 0


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    section = {"dir": str(tmp_path / "not-prepared"), "source": "x.jsonl", "block_length": 64, "vocab_size": 512}
    return write_run(
        tmp_path / "run.yaml",
        section,
        objective="dual",
        model={"config": tiny_llama_config(num_hidden_layers=4)},
        reference={"model": "models/gpt2", "precision": "bf16"},
        train={"learning_rate": 1e-3, "steps": 10, "batch_size": 16, "gradient_accumulation": 2},
    )


def test_the_written_layouts_are_loaded_back_as_planned(tiny: Path, tmp_path: Path) -> None:
    run = load_run(tiny)
    found = plan(run, cluster(gpus=4), tokens=100_000)
    one_of_each = {option.name: option for option in found.options if option.job.micro_batches <= 2}
    for number, option in enumerate(one_of_each.values()):
        json_file, run_file = write_layout(run, option, tmp_path / str(number))
        again = load_run(run_file)
        assert again.train is not None
        assert again.train.deepspeed == str(json_file)
        loaded = job_of(again, material_of(again, 100_000), 4)
        sizes = (
            "reduce_bucket",
            "prefetch",
            "max_reuse",
            "sub_group",
        )  # without effect below stage 3, or in a pipeline
        ours, theirs = vars(option.job), vars(loaded)
        assert {key: ours[key] for key in ours if key not in sizes} == {
            key: theirs[key] for key in theirs if key not in sizes
        }
        noted = "ranked" in run_file.read_text()
        assert noted == (option.job.micro_batches != 2)
    assert {option.job.engine for option in one_of_each.values()} == {"zero", "pipeline", "sharded_pipeline"}


def test_states_in_files_are_put_where_the_run_says_and_what_follows_is_noted(tiny: Path, tmp_path: Path) -> None:
    run = load_run(tiny)
    option = next(option for option in plan(run, cluster()).options if option.job.offload_optimizer == "nvme")
    json_file, run_file = write_layout(run, option, tmp_path / "placeholder")
    assert json.loads(json_file.read_text())["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/local/nvme"
    head = run_file.read_text().partition("\ndata:")[0]
    for words in (str(json_file), "/local/nvme", "cannot be resumed", "set offload_optimizer.device to cpu"):
        assert words in head
    own = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch/states"}}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": own}))
    json_file, run_file = write_layout(load_run(tiny, [f"train.deepspeed={tmp_path / 'own.json'}"]), option, tmp_path)
    assert json.loads(json_file.read_text())["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/scratch/states"
    assert "/scratch/states now" in run_file.read_text()


@pytest.mark.slow
def test_the_written_layout_trains_and_its_checkpoint_is_as_large_as_planned(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config(hidden_size=128, intermediate_size=256)},
        train={"learning_rate": 1e-3, "batch_size": 8, "gradient_accumulation": 2, "steps": 2, "checkpoint_every": 2},
    )
    best = tmp_path / "best"
    told = CliRunner().invoke(app, ["plan", str(run), "--gpus", "2", "--write", str(best), "--json"])
    assert told.exit_code == 0, told.output
    succeed(dualtok("train", best / "run.yaml", ranks=2))
    assert [row["step"] for row in history(run)] == [1, 2]
    planned = json.loads(told.stdout)["budget"]["checkpoints"] / 3
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step-00000002").iterdir())
    assert planned < written < 1.02 * planned


def test_the_command_prints_writes_and_gives_json(tiny: Path, tmp_path: Path) -> None:
    arguments = ["plan", str(tiny), "--gpus", "2", "--gpu-memory", "24GB", "--network", "100Gb/s"]
    shown = CliRunner().invoke(app, [*arguments, "--write", str(tmp_path / "best")])
    assert shown.exit_code == 0, shown.output
    for part in (
        "weights",
        "optimizer",
        "loss head",
        "checkpointing",
        "buffers",
        "resident",
        "offload",
        "tokens/s",
        "unknown: prepare the data",
        "ZeRO-",
    ):
        assert part in shown.output, part
    assert json.loads((tmp_path / "best" / "deepspeed.json").read_text())["zero_optimization"]["stage"] in (1, 2, 3)
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--tokens", "64000"]).stdout)
    assert told["run"]["fits"] is True
    assert told["budget"]["shards"] == 4 * 64_000
    assert told["budget"]["tokens"] == 10 * 16 * 64
    assert told["cluster"]["network"] == 100e9 / 8
    best, run = told["layouts"][0], told["run"]
    assert best["seconds"]["total"] <= 1.03 * run["seconds"]["total"]
    assert (
        sum(part["device"] for name, part in run["memory"].items() if name != "total")
        == (run["memory"]["total"]["device"])
    )


def test_a_layout_that_the_ranks_cannot_have_is_said_and_others_are_shown(tiny: Path) -> None:
    run = load_run(tiny, ["train.engine=pipeline", "train.pipeline={stages: 3}"])
    found = plan(run, cluster(gpus=4))
    assert "3 stages" in found.refused
    assert found.own is None
    assert found.chosen is found.options[0]
    assert found.options[0].fits


def test_prepared_data_and_a_local_config_are_used(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**tiny_llama_config(num_hidden_layers=7), "vocab_size": 600}))
    run = load_run(tiny, ["model.config=null", f"model.path={folder}"])
    found = material_of(run, 640)
    assert len(found.shape.layers) == 7
    assert found.shape.vocabulary == 600
    assert found.blocks == 10
    assert len(found.reference.layers) == 12  # of the known name gpt2


@pytest.mark.parametrize(
    ("overrides", "machines", "message"),
    [
        (["model.config=null", "model.path=meta-llama/Llama-2-7b-h"], {}, "config.json"),
        ([], {"device": "h10"}, "did you mean 'h100'"),
        ([], {"gpu_memory": "80"}, "--gpu-memory"),
        ([], {"network": "fast"}, "--network"),
        (["train.engine=opacus"], {}, "opacus"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    tiny: Path, overrides: list[str], machines: dict[str, Any], message: str
) -> None:
    if "opacus" in message:
        overrides = [
            *overrides,
            "train.precision=fp32",
            "objective=causal_lm",
            "reference=null",
            "privacy={epsilon: 8, delta: 1.0e-5}",
        ]
    with pytest.raises(ConfigError, match=message):
        plan(load_run(tiny, overrides), cluster(**machines))


def test_nothing_is_written_when_nothing_fits(tiny: Path, tmp_path: Path) -> None:
    result = dualtok("plan", tiny, "--gpus", 1, "--gpu-memory", "1MB", "--write", tmp_path / "none")
    assert "no layout fits" in error_line(result)
    assert not (tmp_path / "none").exists()
    assert "None of" in result.stdout


def test_sizes_are_read_with_their_units() -> None:
    assert cluster(gpu_memory="80GB").gpu_memory == 80 * GIB
    assert cluster(gpu_memory="80 GiB").gpu_memory == 80 * GIB
    assert cluster(network="1.6Tb/s").network == 2e11
