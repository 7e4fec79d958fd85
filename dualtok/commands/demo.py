"""``dualtok demo``: the whole job on public text, as an honest experiment, in minutes on two CPU cores.

Private documents are passages of State of the Union addresses; the base model is pretrained shortly on Wikipedia leads.
Plain fine-tuning and the dual loss then learn the same passages from the same base, and both are attacked, beside the
base model and the reference model alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualtok.commands.audit.run import print_figures
from dualtok.commands.export import export
from dualtok.commands.report import read_figures, write_run_report
from dualtok.config.load import parse_run
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import sotu_passages, wikipedia_leads, write_jsonl
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.launch.local import launch
from dualtok.train.checkpoints.writer import COMPLETE
from dualtok.train.folder import CHECKPOINTS

SETTINGS = Path(__file__).with_name("demo.yaml")


@dataclass(frozen=True)
class Stage:
    """One arrow of the way of the data."""

    title: str
    run: str
    """Key of the stage's run in ``demo.yaml``."""
    verb: str
    exports: tuple[tuple[str, str], ...] = ()
    """Pairs (checkpoint, folder name under ``models/``) to export afterwards."""


STAGES = (
    Stage("pretrain the base model on Wikipedia leads", "base", "train", (("best", "base"),)),
    Stage("fine-tune the reference on its own split", "reference", "train", (("best", "reference"),)),
    Stage(
        "fine-tune the attacker's reference on its own split",
        "attack_reference",
        "train",
        (("best", "attack_reference"),),
    ),
    Stage("score the training split with the reference", "dual", "score"),
    Stage("train plainly", "plain", "train", (("best", "plain-best"), ("latest", "plain-last"))),
    Stage("train with the dual loss", "dual", "train", (("best", "dual-best"), ("latest", "dual-last"))),
    Stage("attack every model", "audit", "audit"),
)


def run_demo(folder: Path, processes: int) -> Path:
    """Run every stage that is not done yet in ``folder``; print the comparison table and return the report's path.

    Raises:
        ConfigError: ``folder`` holds a demo with other settings.
        DualtokError: a stage failed.
    """
    started = time.monotonic()
    runs = write_runs(folder)
    stages = len(STAGES) + 2
    _print(1, stages, "prepare both corpora", started)
    for name in ("wikipedia", "sotu"):
        _prepare_corpus(folder, name, runs)
    for number, stage in enumerate(STAGES, start=2):
        _print(number, stages, stage.title, started)
        _run_stage(folder, stage, processes)
    _print(stages, stages, "write the report", started)
    run = parse_run(yaml.safe_load((folder / "audit.yaml").read_text(encoding="utf-8")), source="audit.yaml")
    report = write_run_report(run)
    print_figures(read_figures(run.output_dir))
    print(f"finished after {(time.monotonic() - started) / 60:.1f} minutes\nreport: {report}", flush=True)
    return report


def write_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Write one YAML file per run into ``folder``, made from ``demo.yaml`` beside this module, and return them."""
    text = SETTINGS.read_text(encoding="utf-8").replace("${folder}", str(folder))
    settings = yaml.safe_load(text)
    runs: dict[str, dict[str, Any]] = settings["runs"]
    for name, run in runs.items():
        path = folder / f"{name}.yaml"
        content = yaml.safe_dump(run, sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise ConfigError(f"{path}: a demo with other settings ran in {folder}; remove the folder or use --folder")
        parse_run(run, source=f"demo.yaml: {name}")
        write_text(path, content)
    write_text(folder / "zero3.json", '{"zero_optimization": {"stage": 3}}\n')
    return runs


def _prepare_corpus(folder: Path, name: str, runs: dict[str, dict[str, Any]]) -> None:
    source = folder / "corpora" / f"{name}.jsonl"
    if not source.is_file():
        write_jsonl(wikipedia_leads() if name == "wikipedia" else sotu_passages(), source)
    run = parse_run(runs["base" if name == "wikipedia" else "plain"], source=f"demo.yaml: {name}")
    prepare(run.data)


def _run_stage(folder: Path, stage: Stage, processes: int) -> None:
    """Run a stage unless an earlier start of the demo finished it; a half-finished training run is resumed."""
    done = folder / "done" / f"{stage.run}-{stage.verb}"
    if done.is_file():
        print("  done before")
        return
    arguments = [stage.verb, str(folder / f"{stage.run}.yaml")]
    if stage.verb == "train" and any((folder / stage.run / CHECKPOINTS).glob(f"step-*/{COMPLETE}")):
        arguments.append("--resume")
    launch(arguments, processes, folder / "logs" / f"{stage.run}-{stage.verb}.log")
    for checkpoint, name in stage.exports:
        target = folder / "models" / name
        if not target.exists():
            export(folder / stage.run, target, which=checkpoint)
    write_text(done, "")


def _print(number: int, total: int, title: str, started: float) -> None:
    print(f"[{number}/{total}] {title} ({(time.monotonic() - started) / 60:.1f} min)", flush=True)
