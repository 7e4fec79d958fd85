"""The whole doctor through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.doctor.test_checks import plant
from tests.support import ROOT, dualtok, environment, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

CHECKS = [
    "versions",
    "deepspeed",
    "accelerator",
    "compiler",
    "JIT locks",
    "operators",
    "memory",
    "shared memory",
    "limits",
    "disk",
    "clock",
    "network",
    "run",
    "collectives",
    "gradients",
    "loss kernels",
    "training",
]


@pytest.mark.slow
def test_a_machine_in_order_can_train_the_run(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    """The run is a sharded pipeline, so that its layout is what the two steps are made in."""
    run = write_run(
        tmp_path / "run.yaml",
        {"dir": small_corpus["dir"]},
        objective="causal_lm",
        model={"config": tiny_llama_config()},
        train={
            "learning_rate": 1e-3,
            "batch_size": 8,
            "steps": 4,
            "precision": "fp32",
            "engine": "sharded_pipeline",
            "pipeline": {"stages": 2},
        },
    )
    found = json.loads(succeed(dualtok("doctor", run, "--json", timeout=900)))
    assert [check["name"] for check in found["checks"]] == CHECKS
    assert not found["failed"]
    states = {check["name"]: check["status"] for check in found["checks"]}
    for name in ("versions", "deepspeed", "compiler", "operators", "run", "gradients", "loss kernels", "training"):
        assert states[name] == "ok", found
    training = found["checks"][-1]["found"]
    assert "2 steps of a tiny model with objective dual on 2 ranks, engine sharded_pipeline" in training
    assert not (tmp_path / "run").exists(), "what the doctor wrote is gone"


@pytest.mark.slow
def test_what_is_broken_is_shown_with_its_remedy(tmp_path: Path) -> None:
    lock = tmp_path / "operators" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    plant(tmp_path / "packages", "deepspeed", "0.19.2")
    broken = {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "operators"),
        "GLOO_SOCKET_IFNAME": "ib77",
        "COLUMNS": "400",
        "PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dualtok", "doctor"],
        env=environment(**broken),
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    lines = [line.strip() for line in done.stdout.splitlines()]

    def below(name: str, status: str) -> tuple[str, str]:
        place = next(place for place, line in enumerate(lines) if line.startswith(name + " "))
        assert status in lines[place], lines[place]
        return lines[place], lines[place + 1]

    assert "pip install deepspeed==0.19.8" in below("deepspeed", "fail")[1]
    assert f"rm {lock}" in below("JIT locks", "fail")[1]
    assert "ib77" in below("network", "fail")[0]
    assert "would wait for the stale lock" in below("operators", "not-run")[0]
    for name in CHECKS[-4:]:
        assert "would not get far: see deepspeed" in below(name, "not-run")[0]
    assert lock.exists()
