"""The paper's tables, measured again: every method on the same data, attacked alike, beside the paper's own figures.

    python tools/reproduce_paper.py --scale smoke --folder runs/paper-smoke      # minutes: a test of the way itself
    python tools/reproduce_paper.py --scale cpu --folder runs/paper              # headline rows, 3 seeds x 2 corpora
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts sweeps
    python tools/reproduce_paper.py --scale gpu --folder runs/paper-gpu          # the paper's models and data sets

A cell is one corpus under one seed: its split, its models, one audit. Every step is a `dualtok` command with a run file
of its own in the cell's folder, and is done once: started again, the tool goes on where it stopped. The tables are
written after each finished cell, to ``results.md`` and ``results.json``.

The scale ``gpu`` needs a data hub, a model hub and a GPU; it has not been run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dualtok.data.corpora import sotu_passages, wikipedia_leads, write_jsonl
from dualtok.files import write_text
from dualtok.run import parse_run

Run = dict[str, Any]
Part = Literal["headline", "sweeps"]
PARTS: tuple[Part, ...] = ("headline", "sweeps")
PAPER = {
    # GPT-2 124M on (Wikipedia, CC-news): perplexity, AUC of Loss, Ref, Min-K%, Zlib (arXiv 2502.19726, table 1).
    "base": ((34.429, 0.473, 0.513, 0.446, 0.497), (29.442, 0.505, 0.498, 0.520, 0.500)),
    "plain": ((12.729, 0.577, 0.967, 0.489, 0.544), (21.861, 0.607, 0.855, 0.549, 0.569)),
    "goldfish 25 %": ((12.853, 0.565, 0.954, 0.486, 0.537), (21.902, 0.608, 0.855, 0.547, 0.570)),
    "DP-SGD (8, 1e-05)": ((18.523, 0.463, 0.536, 0.448, 0.491), (26.022, 0.507, 0.513, 0.521, 0.502)),
    "dual": ((13.628, 0.454, 0.463, 0.470, 0.485), (23.733, 0.502, 0.495, 0.529, 0.499)),
}
COLUMNS = {"loss": "Loss", "ref": "Ref", "min_k": "Min-K%", "zlib": "Zlib"}


@dataclass(frozen=True)
class Scale:
    """Models, data and lengths of one scale."""

    corpora: tuple[str, ...]
    seeds: tuple[int, ...]
    shares: dict[str, dict[str, float]]
    """Of each corpus."""
    block_length: int
    vocabulary: int
    pretraining: dict[str, Any]
    """Section ``train`` of the base model, or nothing where ``model`` is a pretrained one."""
    fine_tuning: dict[str, Any]
    private: dict[str, Any]
    """What DP-SGD changes in ``fine_tuning``."""
    reference_epochs: float
    model: dict[str, Any]
    """Section ``model`` of the base model."""
    processes: int = 1
    pretraining_shares: dict[str, float] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Corpus -> keys of ``data`` that say where its documents are; without it the bundled corpora."""


def llama(width: int, layers: int, block_length: int) -> dict[str, Any]:
    """Return the section ``model`` of a small Llama."""
    return {"config": {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "num_key_value_heads": width // 32, "max_position_embeddings": block_length,
        "tie_word_embeddings": True,
    }}  # fmt: skip


def _shares(*, train: float, auxiliary: float, held_out: float) -> dict[str, float]:
    """Return ``data.shares``; the auxiliary splits are equal, at most a quarter of `train`."""
    small = dict.fromkeys(("reference", "attack_reference", "probe", "validation"), auxiliary)
    return {"train": train, **small, "held_out": held_out}


_CPU_OPTIMISER = {"precision": "fp32", "batch_size": 16}
SCALES = {
    "smoke": Scale(
        corpora=("sotu",), seeds=(0,), block_length=64, vocabulary=512, model=llama(32, 2, 64),
        shares={"sotu": _shares(train=0.006, auxiliary=0.003, held_out=0.006)},
        pretraining_shares={"train": 0.02, "reference": 0.05, "validation": 0.005},
        pretraining={**_CPU_OPTIMISER, "learning_rate": 3e-3, "steps": 20, "warmup_steps": 2, "evaluation_blocks": 16},
        fine_tuning={**_CPU_OPTIMISER, "learning_rate": 1e-3, "steps": 8, "warmup_steps": 2, "evaluation_blocks": 16},
        private={"batch_size": 8},
        reference_epochs=1,
    ),
    "cpu": Scale(
        corpora=("sotu", "wikipedia"), seeds=(0, 1, 2), block_length=256, vocabulary=2048, model=llama(128, 3, 256),
        shares={"sotu": _shares(train=0.039, auxiliary=0.0095, held_out=0.044),
                "wikipedia": _shares(train=0.1, auxiliary=0.025, held_out=0.1)},
        pretraining_shares={"train": 0.3, "reference": 0.2, "validation": 0.02},
        pretraining={**_CPU_OPTIMISER, "learning_rate": 3e-3, "steps": 200, "warmup_steps": 10,
                     "evaluation_blocks": 64},
        fine_tuning={**_CPU_OPTIMISER, "learning_rate": 1e-3, "epochs": 5, "warmup_steps": 10,
                     "evaluation_blocks": 128},
        private={"batch_size": 128, "epochs": 20, "learning_rate": 2e-3},
        reference_epochs=8,
    ),
    "gpu": Scale(
        corpora=("wikipedia", "cc_news"), seeds=(0, 1, 2), block_length=1024, vocabulary=50257,
        model={"path": "openai-community/gpt2"}, processes=1, pretraining={},
        # The paper: 3,000 training documents per data set.
        shares=dict.fromkeys(("wikipedia", "cc_news"), _shares(train=0.3, auxiliary=0.075, held_out=0.3)),
        fine_tuning={"precision": "bf16", "batch_size": 16, "learning_rate": 5e-5, "epochs": 5, "warmup_steps": 20},
        private={"batch_size": 512, "gradient_accumulation": 16, "epochs": 10, "learning_rate": 2e-4},
        reference_epochs=5,
        sources={
            "wikipedia": {"source": "wikimedia/wikipedia", "dataset_config": "20231101.en", "max_documents": 10_000},
            "cc_news": {"source": "vblagoje/cc_news", "max_documents": 10_000},
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command, run once when all that it needs is done."""

    name: str
    folder: Path
    """Of the cell."""
    arguments: tuple[str, ...]
    """Of ``dualtok``."""
    needs: tuple[str, ...] = ()
    """Names of other steps."""

    @property
    def mark(self) -> Path:
        """File that says the step is done."""
        return self.folder / "done" / self.name.rsplit("/", maxsplit=1)[-1].replace(" ", "_")


class Cell:
    """The runs of one corpus under one seed, and the steps that carry them out."""

    def __init__(self, scale: Scale, corpus: str, seed: int, root: Path) -> None:
        self.scale, self.corpus, self.seed, self.root = scale, corpus, seed, root
        self.name = f"{corpus}-{seed}"
        self.folder = root / self.name
        self.steps: list[Step] = []
        self.models: dict[str, Path] = {}
        """Row of the audit -> model."""
        self._exported: list[str] = []

    @property
    def base_folder(self) -> Path:
        """Where the base model of this corpus is, shared by its seeds."""
        return self.root / f"base-{self.corpus}"

    @property
    def data(self) -> Run:
        """Section ``data``."""
        scale = self.scale
        bundled = {"source": str(self.root / "corpora" / f"{self.corpus}.jsonl"), "near_duplicate_threshold": 0.5}
        tokenizer = scale.model.get("path") or str(self.base_folder / "data" / "tokenizer")
        return {"dir": str(self.folder / "data"), **(scale.sources.get(self.corpus) or bundled),
                "tokenizer": tokenizer, "seed": self.seed, "block_length": scale.block_length, "lanes": 8,
                "shares": scale.shares[self.corpus], "processes": 1}  # fmt: skip

    def run(self, name: str, objective: str, base: str = "base", **sections: Any) -> Run:
        """Return a fine-tuning run; ``train`` among the sections changes single settings."""
        train = {**self.scale.fine_tuning, "evaluate_every": 1_000_000, **sections.pop("train", {})}
        if "steps" in train and "epochs" in train:
            del train["steps"]
        return {
            "data": self.data, "output_dir": str(self.folder / name), "seed": self.seed, "objective": objective,
            "model": {"path": str(self.model(base))}, "train": train, "monitor": {"log_every": 20}, **sections,
        }  # fmt: skip

    def model(self, name: str) -> Path:
        """Return where a model of this cell is exported to."""
        if name == "base":
            path = self.scale.model.get("path")
            return Path(path) if path else self.base_folder / "models" / "base"
        return self.folder / "models" / name.replace(" ", "_")

    def add(self, name: str, arguments: Sequence[str], needs: Sequence[str] = ()) -> str:
        """Add a step and return its full name."""
        step = Step(f"{self.name}/{name}", self.folder, tuple(arguments), tuple(needs))
        self.steps.append(step)
        return step.name

    def write(self, name: str, run: Run) -> str:
        """Write a run file and return its path; another one of that name must not have run here."""
        parse_run(run, source=f"{self.name}/{name}")
        path = self.folder / f"{name}.yaml"
        content = yaml.safe_dump(run, sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path}: ran with other settings; remove {self.folder}, or use another --folder")
        write_text(path, content)
        return str(path)

    def train(self, name: str, run: Run, needs: Sequence[str], *, row: str | None = None, which: str = "latest") -> str:
        """Add training and export of a run; returns the export's step. ``row`` puts the model into the audit."""
        slug = name.replace(" ", "_")
        trained = self.add(f"train {name}", ["train", self.write(slug, run), "--auto-resume"], needs)
        target = self.model(name)
        exported = self.add(
            f"export {name}", ["export", run["output_dir"], str(target), "--checkpoint", which], [trained]
        )
        if row is not None:
            self.models[row] = target
            self._exported.append(exported)
        return exported

    def base(self) -> str:
        """Add preparation and pretraining of the base model, on the other bundled corpus."""
        scale, folder = self.scale, self.base_folder
        if not scale.pretraining:
            return self.add("prepare", ["prepare", self.write("prepare", {"data": self.data})])
        other = {"sotu": "wikipedia", "wikipedia": "sotu"}[self.corpus]
        data = {"dir": str(folder / "data"), "source": str(self.root / "corpora" / f"{other}.jsonl"),
                "block_length": scale.block_length, "lanes": 8, "vocab_size": scale.vocabulary, "processes": 1,
                "shares": scale.pretraining_shares}  # fmt: skip
        run = {"data": data, "output_dir": str(folder / "run"), "objective": "causal_lm", "model": scale.model,
               "train": scale.pretraining, "monitor": {"log_every": 20}}  # fmt: skip
        shared = Cell(scale, self.corpus, self.seed, self.root)
        shared.name, shared.folder = folder.name, folder
        path = shared.write("base", run)
        prepared = shared.add("prepare", ["prepare", path])
        trained = shared.add("train", ["train", path, "--auto-resume"], [prepared])
        target = str(folder / "models" / "base")
        exported = shared.add("export", ["export", run["output_dir"], target, "--checkpoint", "latest"], [trained])
        self.steps += shared.steps
        return self.add("prepare", ["prepare", self.write("prepare", {"data": self.data})], [exported])

    def headline(self) -> None:
        """Add the rows of the paper's table 1, the two that it leaves out, and a cross-fitted reference."""
        ready = self.base()
        epochs = {"epochs": self.scale.reference_epochs, "evaluate_every": 10}
        self.models["base"] = self.model("base")
        reference = self.train("reference", self.run("reference", "causal_lm", train={**epochs, "split": "reference"}),
                               [ready], row="reference alone", which="best")  # fmt: skip
        attacker = self.run("attack_reference", "causal_lm", train={**epochs, "split": "attack_reference"})
        self._exported.append(self.train("attack_reference", attacker, [ready], which="best"))
        self._plain(ready)
        goldfish = self.run("goldfish", "goldfish", goldfish={"drop_every": 4})
        self.train("goldfish 25", goldfish, [ready], row="goldfish 25 %")
        self._private(8, ready)
        dual = self.run("dual", "dual", **self._reference())
        scored = self.add("score reference", ["score", self.write("dual", dual)], [reference])
        self.train("dual", dual, [scored], row="dual")
        self._cross_fitted(reference)

    def _plain(self, ready: str) -> None:
        every = self._evaluations()
        plain = self.run("plain", "causal_lm", train={"evaluate_every": every, "checkpoint_keep": 100})
        self.train("plain", plain, [ready], row="plain")
        for step in (every, 2 * every, 3 * every):  # early stopping at a third of an epoch and its multiples
            name = f"plain, step {step}"
            target = self.model(name)
            checkpoint = f"step-{step:08d}"
            export = ["export", plain["output_dir"], str(target), "--checkpoint", checkpoint]
            self._exported.append(self.add(f"export {name}", export, [f"{self.name}/train plain"]))
            self.models[name] = target

    def _private(self, epsilon: float, ready: str) -> None:
        name = f"DP-SGD ({epsilon:g}, 1e-05)"
        train = {**self.scale.private, "engine": "opacus", "precision": "fp32"}
        run = self.run(f"dp-sgd-{epsilon:g}", "causal_lm", train=train, privacy={"epsilon": epsilon, "delta": 1e-5})
        self.train(f"dp-sgd {epsilon:g}", run, [ready], row=name)

    def _evaluations(self) -> int:
        return 2 if self.scale is SCALES["smoke"] else 12

    def _reference(self, **changes: Any) -> Run:
        return {"reference": {"model": str(self.model("reference")), "batch_size": 16, **changes}}

    def _cross_fitted(self, reference: str) -> None:
        """Add the cross-fitted references, which start from the reference, and the dual model that learns from them."""
        folds = []
        for fold in (0, 1):
            train = {"leave_out": {"fold": fold, "folds": 2}, "evaluate_every": self._evaluations()}
            run = self.run(f"fold-{fold}", "causal_lm", base="reference", train=train)
            folds.append(self.train(f"fold {fold}", run, [reference], which="best"))
        models = [str(self.model(f"fold {fold}")) for fold in (0, 1)]
        run = self.run("cross-fitted", "dual", reference={"folds": models, "batch_size": 16})
        scored = self.add("score folds", ["score", self.write("cross-fitted", run)], folds)
        self.train("cross-fitted", run, [scored], row="dual, cross-fitted")

    def sweeps(self) -> None:
        """Add the paper's sensitivity and ablation rows; the headline rows must be there."""
        ready, scored = f"{self.name}/prepare", f"{self.name}/score reference"
        for epsilon in (2, 4, 16):
            self._private(epsilon, ready)
        for drop_every, share in ((3, 33), (2, 50)):
            run = self.run(f"goldfish-{share}", "goldfish", goldfish={"drop_every": drop_every})
            self.train(f"goldfish {share}", run, [ready], row=f"goldfish {share} %")
        self.train("selective", self.run("selective", "selective", **self._reference()), [scored], row="selective")
        for setting, values in (("alpha", (0.1, 0.2, 0.4, 1.0, 1.5, 2.0)), ("hard_share", (0.2, 0.4, 0.8)),
                                ("memorised_share", (0.1, 0.4))):  # fmt: skip
            for value in values:
                name = f"dual {setting} {value:g}"
                selection = {setting: value} if setting != "memorised_share" else {setting: value, "hard_share": 0.5}
                run = self.run(name.replace(" ", "-"), "dual", selection=selection, **self._reference())
                self.train(name, run, [scored], row=name)
        general = {"reference": {"model": str(self.model("base")), "batch_size": 16}}
        run = self.run("dual-base-reference", "dual", **general)
        base_scored = self.add("score base", ["score", self.write("dual-base-reference", run)], [ready])
        self.train("dual base reference", run, [base_scored], row="dual, base as reference")

    def audit(self, part: Part) -> None:
        """Add the attacks on all models so far."""
        name = "audit" if part == "headline" else f"audit-{part}"
        run = {"data": self.data, "output_dir": str(self.folder / name), "audit": {
            "models": {row: str(model) for row, model in self.models.items()},
            "attack_reference": str(self.model("attack_reference")), "batch_size": 16,
        }}  # fmt: skip
        self.add(name, ["audit", self.write(name, run)], self._exported)
        self.models, self._exported = {}, [f"{self.name}/export attack_reference"]


def carry_out(steps: Sequence[Step], jobs: int, after: Callable[[Step], None]) -> None:
    """Run the steps that are not done, at most ``jobs`` at once, each after those it needs.

    Raises:
        SystemExit: a step failed; names it and its log. Steps that were running are waited for.
    """
    unique = {step.name: step for step in steps}
    done = {name for name, step in unique.items() if step.mark.is_file()}
    waiting = [step for name, step in unique.items() if name not in done]
    started, failed = time.monotonic(), ""
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[int], Step] = {}
        while (waiting and not failed) or running:
            ready = [step for step in waiting if done.issuperset(step.needs)][: jobs - len(running)]
            if not failed:
                for step in ready:
                    waiting.remove(step)
                    running[pool.submit(_execute, step)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                if future.result():
                    failed = f"{step.name} failed with status {future.result()}; see {_log(step)}"
                    continue
                write_text(step.mark, "")
                done.add(step.name)
                minutes = (time.monotonic() - started) / 60
                print(f"[{len(done)}/{len(unique)}] {step.name} ({minutes:.1f} min)", flush=True)
                after(step)
    if failed:
        raise SystemExit(failed)


def _log(step: Step) -> Path:
    return step.folder / "logs" / f"{step.mark.name}.log"


def _execute(step: Step) -> int:
    """Run one step as a process of its own and return its status."""
    if step.arguments[0] == "export" and Path(step.arguments[2]).exists():
        return 0  # export is atomic: the folder is whole, only its mark was lost
    variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    variables.setdefault("OMP_NUM_THREADS", "1")
    _log(step).parent.mkdir(parents=True, exist_ok=True)
    with _log(step).open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "dualtok", *step.arguments]
        return subprocess.run(command, env=variables, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


@dataclass(frozen=True)
class Figure:
    """Mean and spread of one figure over seeds."""

    values: tuple[float, ...]

    def __str__(self) -> str:
        """Return ``mean ± sample standard deviation``."""
        digits = 1 if max(self.values) > 2 else 3
        mean = f"{statistics.fmean(self.values):.{digits}f}"
        return mean if len(self.values) == 1 else f"{mean} ± {statistics.stdev(self.values):.{digits}f}"


def collect(cells: Sequence[Cell]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return corpus -> row -> one entry per finished cell, as ``dualtok audit`` measured it."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in cells:
        for file in sorted(cell.folder.glob("audit*/audit/audit.json")):
            for model in json.loads(file.read_text())["models"]:
                rows.setdefault(cell.corpus, {}).setdefault(model["name"], []).append({"seed": cell.seed, **model})
    return rows


def figures_of(entries: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Return a row's figures: held-out perplexity, each attack's AUC and TPR, the strongest attack."""

    def over(value: Callable[[dict[str, Any]], float | None]) -> Figure | None:
        values = tuple(float(v) for entry in entries if (v := value(entry)) is not None)
        return Figure(values) if values else None

    def attack(entry: dict[str, Any], name: str) -> dict[str, Any] | None:
        return next((a for a in entry["attacks"] if a["name"] == name), None)

    found: dict[str, Figure | None] = {
        "perplexity": over(lambda entry: entry["perplexity_non_members"]),
        "strongest": over(lambda entry: entry["strongest"]["auc_two_sided"]["value"]),
        "gap": over(lambda entry: entry["loss_gap"]),
    }
    for name in dict.fromkeys(a["name"] for entry in entries for a in entry["attacks"]):
        found[name] = over(lambda entry, name=name: (a := attack(entry, name)) and a["auc"]["value"])
        found[f"tpr {name}"] = over(lambda entry, name=name: (a := attack(entry, name)) and _tpr(a))
    return {name: figure for name, figure in found.items() if figure is not None}


def _tpr(attack: dict[str, Any], rate: float = 0.01) -> float | None:
    found = next((entry for entry in attack["tpr"] if math.isclose(entry["target_fpr"], rate)), None)
    return found["tpr"]["value"] if found and found["tpr"] else None


def write_results(cells: Sequence[Cell], root: Path) -> None:
    """Write ``results.json``, ``results.md`` and the trade-off plot from all audits that are there."""
    rows = {corpus: {row: figures_of(entries) for row, entries in table.items()}
            for corpus, table in collect(cells).items()}  # fmt: skip
    plain = {corpus: {row: {name: figure.values for name, figure in figures.items()} for row, figures in table.items()}
             for corpus, table in rows.items()}  # fmt: skip
    write_text(root / "results.json", json.dumps(plain, indent=1))
    lines: list[str] = []
    for number, (corpus, table) in enumerate(rows.items()):
        lines += [f"## {corpus}", "", *_table(table, number), "", *_ordering(table), ""]
        _trade_off(table, root / f"trade-off-{corpus}.svg")
    write_text(root / "results.md", "\n".join(lines))


def _table(table: dict[str, dict[str, Figure]], column: int) -> Iterator[str]:
    """Yield one line per row: ours, and the paper's figure for GPT-2 behind it."""
    yield (
        "| method | seeds | perplexity (paper) | "
        + " | ".join(f"{label} (paper)" for label in COLUMNS.values())
        + (" | strongest, two-sided | Ref TPR at FPR .01 |")
    )
    yield "|---" * (len(COLUMNS) + 5) + "|"
    for row, figures in table.items():
        paper = PAPER[row][min(column, 1)] if row in PAPER else None
        order = ("perplexity", "loss", "ref", "min_k", "zlib")
        theirs = dict(zip(order, paper, strict=True)) if paper else {}
        cells = [f"{figures[name]} ({theirs[name]:g})" if name in theirs else f"{figures.get(name, 'n/a')}"
                 for name in ("perplexity", *COLUMNS)]  # fmt: skip
        yield (
            f"| {row} | {len(figures['perplexity'].values)} | "
            + " | ".join([*cells, str(figures["strongest"]), str(figures.get("tpr ref", "n/a"))])
            + " |"
        )


def _ordering(table: dict[str, dict[str, Figure]]) -> Iterator[str]:
    """Yield whether each claim of the paper holds in every seed."""
    yield "| claim | holds |"
    yield "|---|---|"
    for row, low, high in (("plain", 0.75, 1.0), ("goldfish 25 %", 0.75, 1.0), ("DP-SGD (8, 1e-05)", 0.0, 0.6),
                           ("dual", 0.0, 0.6)):  # fmt: skip
        if row in table:
            values = table[row]["ref"].values
            held = sum(low <= value <= high for value in values)
            yield f"| Ref AUC of {row} within [{low:g}, {high:g}] | {held} of {len(values)} seeds |"
    yield from _better(table, "dual", "DP-SGD (8, 1e-05)")
    yield from _better(table, "dual", "reference alone")
    for other in ("dual", "reference alone"):
        yield from _better(table, "dual, cross-fitted", other)


def _better(table: dict[str, dict[str, Figure]], row: str, other: str) -> Iterator[str]:
    if row in table and other in table:
        pairs = list(zip(table[row]["perplexity"].values, table[other]["perplexity"].values, strict=True))
        ratio = Figure(tuple(ours / theirs for ours, theirs in pairs))
        held = sum(ours < theirs for ours, theirs in pairs)
        yield f"| perplexity of {row} below that of {other} (ratio {ratio}) | {held} of {len(pairs)} seeds |"


def _trade_off(table: dict[str, dict[str, Figure]], path: Path) -> None:
    """Draw perplexity against the Ref attack and against the strongest attack."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 4.2), layout="constrained")
    for axes, (name, label) in zip(canvas.subplots(1, 2, sharey=True), (
        ("ref", "AUC of Ref"), ("strongest", "strongest attack, two-sided AUC"),
    ), strict=True):  # fmt: skip
        for row, figures in table.items():
            if name in figures:
                point = statistics.fmean(figures[name].values), statistics.fmean(figures["perplexity"].values)
                axes.plot(*point, "o")
                axes.annotate(row, point, fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.axvline(0.5, linewidth=0.6, color="grey")
        axes.set(xlabel=label, yscale="log")
    canvas.axes[0].set_ylabel("held-out perplexity")
    canvas.savefig(path)


def main() -> None:
    """Carry out the asked parts of a scale and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["headline"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands at once")
    parser.add_argument("--cells", nargs="+", default=None, help="e.g. sotu-0 wikipedia-2; without it all")
    options = parser.parse_args()
    scale, root = SCALES[options.scale], options.folder.resolve()
    for name, texts in {"sotu": sotu_passages, "wikipedia": wikipedia_leads}.items():
        file = root / "corpora" / f"{name}.jsonl"
        if not scale.sources and not file.is_file():
            write_jsonl(texts(), file)
    cells = [Cell(scale, corpus, seed, root) for seed in scale.seeds for corpus in scale.corpora]
    chosen = [cell for cell in cells if options.cells is None or cell.name in options.cells]
    for cell in chosen:
        cell.headline()
        cell.audit("headline")
        if "sweeps" in options.parts and (cell.corpus, cell.seed) == (scale.corpora[0], scale.seeds[0]):
            cell.sweeps()
            cell.audit("sweeps")
    lock = threading.Lock()

    def after(step: Step) -> None:
        if step.arguments[0] == "audit":
            with lock:
                write_results(cells, root)

    carry_out([step for cell in chosen for step in cell.steps], options.jobs, after)
    write_results(cells, root)
    print((root / "results.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
