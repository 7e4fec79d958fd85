"""``dualtok demo``: ``dualtok run`` on public text, as an honest experiment, in minutes on two CPU cores.

Private documents are passages of State of the Union addresses; the base model is pretrained shortly on Wikipedia leads.
Plain fine-tuning and the dual loss then learn the same passages from the same base, and both are attacked, beside the
base model and the reference model alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dualtok.commands.run.command import finish
from dualtok.commands.run.run import Way
from dualtok.commands.run.step import Source, Step, prepared
from dualtok.commands.run.way import steps_of
from dualtok.config.load import parse_run
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.train.folder import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Iterator

# Imported where they are used, for what they take to load: dualtok.data.sources.corpora (pyarrow, .2 s).

SETTINGS = Path(__file__).with_name("demo.yaml")


def run_demo(folder: Path, processes: int) -> Path:
    """Run every step that is not done yet in ``folder``; print the comparison table and return the report's path.

    Raises:
        ConfigError: ``folder`` holds a demo with other settings.
        DualtokError: a step failed.
    """
    started = time.monotonic()
    runs = write_runs(folder, processes)
    print(f"the demo, in {folder}: its settings are in {folder / 'run.yaml'}", flush=True)
    write_corpora(folder)
    steps = demo_steps(folder, runs)
    Way(steps, folder, f"dualtok demo --folder {folder}").carry_out()
    finish(steps, started)
    assert steps[-1].product is not None
    return steps[-1].product


def demo_steps(folder: Path, runs: dict[str, dict[str, Any]]) -> list[Step]:
    """Return the steps: the base model's, then those of ``dualtok run``."""
    sources = {
        name: Source(folder / f"{name}.yaml", parse_run(run, f"demo.yaml: {name}")) for name, run in runs.items()
    }
    base = list(_base_steps(folder, sources["base"]))
    rest = steps_of(sources["run"], base=base[-1])
    # The passages are cut by the tokenizer of the base model.
    rest = [replace(step, needs=(base[0].name,)) if step.verb == "prepare" else step for step in rest]
    return [*base, *rest]


def _base_steps(folder: Path, source: Source) -> Iterator[Step]:
    """Yield the steps that make the base model, the last one being its export."""
    run = source.run
    corpus = (str(run.data.source),)
    yield source.step("base-prepare", "prepare Wikipedia leads", "prepare", contents=corpus, product=prepared(run))
    trained = Path(run.output_dir)
    title = "pretrain the base model on Wikipedia leads"
    yield source.step("base", title, "train", needs=("base-prepare",), product=trained / CHECKPOINTS)
    model = folder / "models" / "base"
    where = (str(trained), str(model))
    yield source.step("base-export", "export base", "export", positional=where, needs=("base",), product=model)


def write_runs(folder: Path, processes: int = 2) -> dict[str, dict[str, Any]]:
    """Write both run files into ``folder``, made from ``demo.yaml`` beside this module, and return them.

    Raises:
        ConfigError: ``folder`` holds a demo with other settings.
    """
    text = SETTINGS.read_text(encoding="utf-8").replace("${folder}", str(folder))
    settings = yaml.safe_load(text)
    runs: dict[str, dict[str, Any]] = settings["runs"]
    ranks = {"launcher": "torchrun", "ranks": processes} if processes > 1 else {"launcher": "none", "ranks": None}
    for name, run in runs.items():
        run["workflow"] |= ranks
        path = folder / f"{name}.yaml"
        content = yaml.safe_dump(run, sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise ConfigError(f"{path}: a demo with other settings ran in {folder}; remove the folder or use --folder")
        parse_run(run, source=f"demo.yaml: {name}")
        write_text(path, content)
    write_text(folder / "zero3.json", '{"zero_optimization": {"stage": 3}}\n')
    return runs


def write_corpora(folder: Path) -> None:
    """Write both corpora into ``folder``, unless they are there."""
    from dualtok.data.sources.corpora import sotu_passages, wikipedia_leads, write_jsonl

    for name, documents in (("wikipedia", wikipedia_leads), ("sotu", sotu_passages)):
        source = folder / "corpora" / f"{name}.jsonl"
        if not source.is_file():
            write_jsonl(documents(), source)
