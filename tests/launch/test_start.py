"""What ``dualtok launch`` writes and refuses; the scripts themselves run in tests/e2e and tests/cluster."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.load import load_run
from dualtok.errors import ConfigError
from dualtok.launch.hostfile import choose_hosts, read_hostfile
from dualtok.launch.start import build_start
from tests.support import ROOT, dualtok, error_line, succeed, write_run
from tools.write_recipes import recipes

if TYPE_CHECKING:
    from pathlib import Path

RECIPE_SETTINGS = (
    "HOSTFILE",
    "NODES",
    "MIN_NODES",
    "LAST_CALL",
    "READ_TIMEOUT",
    "GPUS",
    "MASTER",
    "PORT",
    "JOB",
    "RESTARTS",
    "STOP_SECONDS",
    "PYTHON",
    "LOGS",
    "INTERFACE",
    "CACHE",
)
"""What the scripts take from the environment where they are recipes."""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "run.yaml",
        {"dir": "shards"},
        model={"path": "model"},
        objective="causal_lm",
        train={"learning_rate": 1e-3, "batch_size": 16, "steps": 4},
    )


def plan(run_file: Path, *overrides: str, **changes: Any) -> dict[str, str]:
    arguments = {"verb": "train", "backend": "torchrun", "nodes": None, "gpus": 2, **changes}
    return build_start(load_run(run_file, overrides), run_file, overrides, **arguments).files


def hostfile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hosts"
    path.write_text(text)
    return f"launch.hostfile={path}"


def test_recipes_are_what_the_templates_give() -> None:
    """After a change: python tools/write_recipes.py."""
    for name, text in recipes().items():
        assert (ROOT / "launch" / name).read_text() == text, name


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_a_script_parses_and_says_how_to_start_it(path: Path) -> None:
    succeed(subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False))
    assert f"launch/{path.name} train run.yaml" in path.read_text()
    assert path.stat().st_mode & 0o111


def test_a_dry_run_prints_script_and_command_and_writes_nothing(run_file: Path, tmp_path: Path) -> None:
    hosts = hostfile(tmp_path, "# two hosts\nnode0 slots=4\nnode1 slots=4\n")
    before = sorted(tmp_path.rglob("*"))
    options = ["train.steps=9", hosts, "launch.interface=ib0", "--backend", "deepspeed", "--dry-run"]
    shown = succeed(dualtok("launch", run_file, *options))
    assert sorted(tmp_path.rglob("*")) == before
    assert shown.splitlines()[-1] == f"bash {tmp_path / 'run' / 'launch' / 'deepspeed_pdsh.sh'}"
    assert f"set -- train {run_file} train.steps=9 --auto-resume" in shown
    assert "launch.hostfile" not in shown, "settings of the launch are not passed on"


@pytest.mark.parametrize(
    ("backend", "option", "command", "part"),
    [
        ("torchrun", "launch.master=node0", "bash {}/torchrun_nodes.sh", "--rdzv-backend c10d"),
        ("mpi", "launch.interface=ib0", "bash {}/mpirun.sh", 'exec mpirun -n "$((NODES * GPUS))"'),
        ("slurm", "launch.slurm.start=mpi", "sbatch {}/slurm_mpi.sbatch", "#SBATCH --nodes=2"),
        ("k8s", "launch.k8s.kind=MPIJob", "kubectl apply -f {}/mpijob.yaml", "kind: MPIJob"),
    ],
)
def test_every_backend_has_a_dry_run(run_file: Path, backend: str, option: str, command: str, part: str) -> None:
    hosts = hostfile(run_file.parent, "node0 slots=2\nnode1 slots=2\n")
    machines = ["--backend", backend, "--nodes", "2", "--gpus", "2"]
    shown = succeed(dualtok("launch", run_file, hosts, option, *machines, "--dry-run"))
    assert part in shown
    last = [line for line in shown.splitlines() if not line.startswith("#")][-1]
    assert last == command.format(run_file.with_suffix("") / "launch")
    assert not run_file.with_suffix("").exists()


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("torchrun", ["launch.master=node0"]),
        ("mpi", []),
        ("slurm", ["launch.slurm.start=torchrun"]),
        ("deepspeed", []),
        ("deepspeed", ["launch.deepspeed.remote=ssh"]),
        ("deepspeed", ["launch.deepspeed.remote=none", "launch.master=node0"]),
    ],
)
def test_an_exported_variable_does_not_undo_what_was_asked_for(
    run_file: Path, tmp_path: Path, backend: str, settings: list[str]
) -> None:
    """The head of the script, run with each of its variables exported, sets them as without."""
    hosts = hostfile(tmp_path, "node0 slots=2\nnode1 slots=2\n")
    script = next(iter(plan(run_file, hosts, *settings, backend=backend, nodes=2).values()))
    names = [name for name in RECIPE_SETTINGS if re.search(f"^{name}=", script, re.MULTILINE)]
    assert {"GPUS", "RESTARTS", "LOGS"} < set(names)
    head = "\n".join(line for line in script.splitlines() if re.match(rf"({'|'.join(names)})=", line))
    told = head + "\necho " + " ".join(f'"${name}"' for name in names)
    plain, stray = (
        succeed(
            subprocess.run(
                ["bash", "-c", f"LISTED=(node0); {told}"], env=variables, capture_output=True, text=True, check=False
            )
        )
        for variables in ({"PATH": os.environ["PATH"]}, {"PATH": os.environ["PATH"]} | dict.fromkeys(names, "7"))
    )
    assert plain == stray
    assert "2" in plain.split()


def test_the_recipes_take_every_setting_from_the_environment() -> None:
    text = (ROOT / "launch" / "torchrun_nodes.sh").read_text()
    assert 'NODES="${NODES:-2}"' in text
    assert 'MIN_NODES="${MIN_NODES:-$NODES}"' in text


def test_the_script_that_ssh_starts_on_each_host_is_told_all_by_the_one_that_starts_it(
    run_file: Path, tmp_path: Path
) -> None:
    hosts = hostfile(tmp_path, "node0 slots=2\nnode1 slots=2\n")
    files = plan(run_file, hosts, "launch.deepspeed.remote=ssh", backend="deepspeed", nodes=2)
    starter = files["deepspeed_ssh.sh"]
    told = starter.split("variables=(")[1].split(")")[0] + starter.split("env -C")[1]
    for name in re.findall(r'^([A-Z]+)="\$\{', files["deepspeed_no_ssh.sh"], re.MULTILINE):
        assert f"{name}=" in told, name


def test_fewer_hosts_than_all_may_go_on(run_file: Path, tmp_path: Path) -> None:
    [script] = plan(
        run_file, "launch.min_nodes=1", "launch.master=node0", "launch.torchrun.last_call_seconds=9", nodes=2
    ).values()
    assert 'MIN_NODES="1"' in script
    assert 'LAST_CALL="9"' in script
    [script] = plan(run_file, "launch.master=node0", nodes=2).values()
    assert 'MIN_NODES="$NODES"' in script


def test_a_slurm_job_carries_its_settings(run_file: Path) -> None:
    settings = [
        "launch.slurm.partition=gpu",
        "launch.slurm.account=lab",
        "launch.slurm.options=[--constraint=h100]",
        "launch.stop_seconds=90",
        "launch.environment={A: 'two words'}",
    ]
    [script] = plan(run_file, *settings, backend="slurm", nodes=4).values()
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        "--job-name=dualtok-run",
        "--nodes=4",
        "--ntasks-per-node=2",
        "--gres=gpu:2",
        "--exclusive",
        "--time=24:00:00",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@90",
        f'--output="{run_file.with_suffix("")}/launch/%j.log"',
        "--partition=gpu",
        "--account=lab",
        "--constraint=h100",
    ]
    assert "export A='two words'" in script


def test_other_verbs_do_not_resume(run_file: Path) -> None:
    [script] = plan(run_file, verb="score").values()
    assert f"set -- score {run_file}\n" in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node0 slots=4\nnode1 slots=2\n", r"different numbers of slots \(node0: 4, node1: 2\); give --gpus"),
        ("node0 slots=4\nnode0 slots=4\n", "line 2: node0 is there twice"),
        ("node0 slots=4\n\nnode1 4\n", "line 3: 'node1 4' is not of the form `HOST slots=RANKS`"),
        ("# nobody\n", "no host in it"),
        ("-oProxyCommand=x slots=2\n", "line 1: "),
        ("node0 slots=0\n", "line 1: "),
    ],
)
def test_a_bad_hostfile_is_named(run_file: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(run_file, hostfile(tmp_path, text), backend="deepspeed", gpus=None)


def test_hosts_are_chosen_in_order(tmp_path: Path) -> None:
    hostfile(tmp_path, "a slots=4 # first\nb slots=8\nc slots=4\n")
    path = tmp_path / "hosts"
    assert list(read_hostfile(path)) == ["a", "b", "c"]
    assert choose_hosts(path, None, 4) == (["a", "b", "c"], 4)
    assert choose_hosts(path, 1, None) == (["a"], 4)
    with pytest.raises(ConfigError, match=r"--gpus 8: .* fewer slots \(a: 4\)"):
        choose_hosts(path, 2, 8)
    with pytest.raises(ConfigError, match=r"--nodes 4: .* has 3 hosts"):
        choose_hosts(path, 4, None)


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["launch.hostfile=absent"], {"backend": "deepspeed"}, "absent: No such file.*hostfile"),
        ([], {"backend": "deepspeed"}, "launch.hostfile: missing"),
        ([], {"backend": "mpi", "nodes": 2}, "launch.hostfile: missing; mpirun"),
        ([], {"nodes": 2}, "launch.master: missing; with several hosts torchrun"),
        ([], {"gpus": None}, "--gpus: missing; this host shows no accelerator"),
        ([], {"backend": "slrum"}, "did you mean 'slurm'"),
        ([], {"verb": "prepare"}, "--verb 'prepare'"),
        ([], {"gpus": 3}, "16 per micro-batch, which 3 ranks cannot share evenly"),
        (["train.engine=pipeline", "train.pipeline.stages=4"], {}, "4 stages cannot share 2 ranks evenly"),
        (["launch.slurm.mpi=pmi2"], {}, "launch.slurm.mpi: has no effect"),
        (
            ["launch.min_nodes=1"],
            {"backend": "slurm", "nodes": 2},
            "launch.min_nodes: has no effect with --backend slurm",
        ),
        (["launch.min_nodes=3", "launch.master=a"], {"nodes": 2}, "3 are more than the 2 hosts"),
        (["launch.min_nodes=2", "launch.master=a"], {"nodes": 4}, "on 3 of 4 hosts the run could not go on: .*16"),
        (["launch.interfce=eth0"], {}, "unknown key 'launch.interfce' \\(did you mean 'interface'"),
    ],
)
def test_bad_input_is_refused_with_the_next_step(
    run_file: Path, overrides: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(run_file, *overrides, **changes)


def test_a_program_that_is_not_there_is_named(run_file: Path, tmp_path: Path) -> None:
    result = dualtok("launch", run_file, "--backend", "k8s", "--gpus", "1", PATH=str(tmp_path))
    assert "kubectl: not installed on this host" in error_line(result)
    assert not run_file.with_suffix("").exists()
