"""What a command imports before it can answer: libraries that take seconds are left to those that need them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT, environment, tiny_llama_config, write_run

if TYPE_CHECKING:
    from pathlib import Path

SLOW = {
    "accelerate",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "peft",
    "plotly",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "torch",
    "transformers",
}
"""Libraries that take from .1 to 4 s to import."""


def start(*arguments: Any) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the command line in a new process; return its result and the top packages that it imported."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dualtok", *map(str, arguments)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    rows = [line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")]
    return result, {row.partition(".")[0] for row in rows}


def test_the_package_itself_loads_none_of_them() -> None:
    """Nor do the trainers of ``dualtok.integrations``, before they are asked for."""
    program = (
        "import sys, dualtok, dualtok.integrations; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert {name for name in SLOW if f"'{name}'" in found.stdout} == set()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "run.yaml",
        {"dir": str(tmp_path / "not-prepared"), "source": "x.jsonl", "block_length": 64, "vocab_size": 512},
        objective="dual",
        model={"config": tiny_llama_config()},
        reference={"model": "models/gpt2", "precision": "bf16"},
        train={"learning_rate": 1e-3, "steps": 10, "batch_size": 16, "deepspeed": "ds_configs/8gpu_zero3.json"},
    )


def test_a_missing_run_file_is_told_at_once(tmp_path: Path) -> None:
    result, imported = start("train", tmp_path / "missing.yaml")
    assert result.returncode == 2
    assert "no such file" in result.stderr
    assert "dualtok" in imported
    assert imported & SLOW == set()


def test_a_typo_in_a_run_file_is_told_at_once(run_file: Path) -> None:
    run_file.write_text(run_file.read_text().replace("learning_rate:", "learning_rat:"))
    result, imported = start("train", run_file)
    assert result.returncode == 2
    assert "did you mean 'learning_rate'" in result.stderr
    assert imported & SLOW == set()


def test_the_steps_of_a_run_are_told_at_once(run_file: Path) -> None:
    result, imported = start("run", run_file, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("# [1/")
    assert imported & SLOW == set()


@pytest.mark.parametrize("verb", ["settings", "schema"])
def test_the_settings_are_described_at_once(verb: str) -> None:
    result, imported = start(verb)
    assert result.returncode == 0, result.stderr
    assert "learning_rate" in result.stdout or "sections" in result.stdout
    assert imported & SLOW == set()


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_the_status_of_a_run_is_told_at_once(run_file: Path, how: list[str]) -> None:
    folder = run_file.parent / "run"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    (folder / "run.yaml").write_text(run_file.read_text())
    result, imported = start("status", folder, *how)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert imported & SLOW == set()


@pytest.mark.parametrize("name", ["gpt2", "llama2_7b_lora", "llama3_8b", "pythia_1_4b", ""])
def test_a_well_known_architecture_is_planned_at_once(run_file: Path, name: str) -> None:
    file = ROOT / "launch" / "runs" / f"{name}.yaml" if name else run_file
    result, imported = start("plan", file, "--nodes", 4, "--gpus", 8, "--device", "h100")
    assert result.returncode == 0, result.stderr
    assert "billion parameters" in result.stdout
    assert imported & SLOW == set()


def test_another_architecture_is_planned_with_transformers(run_file: Path) -> None:
    overrides = ["model.config={model_type: olmo, num_hidden_layers: 2}"]
    result, imported = start("plan", run_file, *overrides)
    assert result.returncode == 0, result.stderr
    assert {"torch", "transformers"} <= imported
