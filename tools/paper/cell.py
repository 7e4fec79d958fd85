"""One corpus under one seed: its data, its models, and the commands that make them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from paper.steps import Step

from dualtok.config.load import parse_run
from dualtok.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paper.scales import Scale

Run = dict[str, Any]
ATTACKER = "attack_reference"
"""The split that the attacker's references are trained on."""


class Cell:
    """The runs of one corpus under one seed, and the steps that carry them out.

    Args:
        scale: models and lengths.
        corpus: key of ``scale.shares``.
        seed: of splits and training.
        root: folder of all cells.
        variant: tells apart cells of one corpus and seed that differ in their data; each has its own audit.
        shares: ``data.shares``; without them those of the scale.
        base: name of the base model's folder; without it that of the corpus.
        counts: documents of each split, for splits that may be smaller than a batch.
    """

    def __init__(
        self,
        scale: Scale,
        corpus: str,
        seed: int,
        root: Path,
        *,
        variant: str = "",
        shares: dict[str, float] | None = None,
        base: str | None = None,
        counts: dict[str, int] | None = None,
    ) -> None:
        self.scale, self.corpus, self.seed, self.root, self.variant = scale, corpus, seed, root, variant
        self.name = f"{corpus}-{seed}" + (f"-{variant}".replace(" ", "-") if variant else "")
        self.folder = root / self.name
        self.shares = shares or scale.shares[corpus]
        self.counts = counts or {}
        self.base_folder = root / (base or f"base-{corpus}")
        self.steps: list[Step] = []
        self._models: dict[str, Path] = {}
        self._exported: list[str] = []

    @property
    def data(self) -> Run:
        """Section ``data``."""
        scale = self.scale
        bundled = {"source": str(self.corpus_file(self.corpus)), "near_duplicate_threshold": 0.5}
        tokenizer = scale.model.get("path") or str(self.base_folder / "data" / "tokenizer")
        return {
            "dir": str(self.folder / "data"),
            **(scale.sources.get(self.corpus) or bundled),
            "tokenizer": tokenizer,
            "seed": self.seed,
            "block_length": scale.block_length,
            "lanes": 8,
            "shares": self.shares,
            "processes": 1,
        }

    def corpus_file(self, corpus: str) -> Path:
        """Return the file of a bundled corpus."""
        return self.root / "corpora" / f"{corpus}.jsonl"

    def run(
        self, name: str, objective: str, base: str = "base", *, documents: int | None = None, **sections: Any
    ) -> Run:
        """Return a fine-tuning run; ``train`` and ``model`` among the sections change single settings.

        Args:
            name: of its folder.
            objective: what it learns by.
            base: model that it starts from.
            documents: that it learns, where these are not a whole split.
            **sections: of the run file.
        """
        changed = sections.pop("train", {})
        train = {**self.scale.fine_tuning, "evaluate_every": 1_000_000, **changed}
        if "steps" in train and "epochs" in train:
            del train["epochs" if "steps" in changed else "steps"]
        count = documents or self.counts.get(train.get("split", "train"))
        if count is not None and "epochs" in train:
            train |= _fitting(train, count)
        own = sections.pop("model", {})
        adapters = {} if "ia3" in own else self.scale.adapters
        model = {"path": str(self.model(base)), **adapters, **own}
        return {
            "data": self.data,
            "output_dir": str(self.folder / name),
            "seed": self.seed,
            "objective": objective,
            "model": model,
            "train": train,
            "monitor": {"log_every": 20},
            **sections,
        }

    def model(self, name: str) -> Path:
        """Return where a model of this cell is exported to."""
        if name == "base":
            path = self.scale.model.get("path")
            return Path(path) if path else self.base_folder / "models" / "base"
        return self.folder / "models" / name.replace(" ", "_")

    def reference(self, name: str = "reference", **changes: Any) -> Run:
        """Return the section ``reference`` that names a model of this cell."""
        return {"reference": {"model": str(self.model(name)), "batch_size": 16, **changes}}

    def references(self, names: Sequence[str]) -> Run:
        """Return the setting of the section ``audit`` that gives the attacker these models as references."""
        return {"attack_reference": {name.replace(" ", "_"): str(self.model(name)) for name in names}}

    def add(self, name: str, arguments: Sequence[str], needs: Sequence[str] = ()) -> str:
        """Add a step and return its full name."""
        step = Step(f"{self.name}/{name}", self.folder, tuple(arguments), tuple(needs))
        self.steps.append(step)
        return step.name

    def write(self, name: str, run: Run) -> str:
        """Write a run file and return its path; another one of that name must not be there, for it may have run."""
        parse_run(run, source=f"{self.name}/{name}")
        path = self.folder / f"{name}.yaml"
        content = yaml.safe_dump(run, sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise SystemExit(
                f"{path}: was planned with other settings; remove it if it has not run, else {self.folder}, or use "
                "another --folder"
            )
        write_text(path, content)
        return str(path)

    def prepare(self) -> str:
        """Add the preparation of the cell's data, after that of its base model."""
        needs = [] if self.scale.model.get("path") else [f"{self.base_folder.name}/export"]
        return self.add("prepare", ["prepare", self.write("prepare", {"data": self.data})], needs)

    def train(self, name: str, run: Run, needs: Sequence[str], *, row: str | None = None, which: str = "latest") -> str:
        """Add training and export of a run; returns the export's step. ``row`` puts the model into the next audit."""
        slug = name.replace(" ", "_")
        trained = self.add(f"train {name}", ["train", self.write(slug, run), "--auto-resume"], needs)
        return self.export(name, run, trained, row=row, which=which)

    def export(self, name: str, run: Run, trained: str, *, row: str | None = None, which: str = "latest") -> str:
        """Add the export of one checkpoint of a run; adapters are merged."""
        target = self.model(name)
        arguments = ["export", run["output_dir"], str(target), "--checkpoint", which]
        if "lora" in run["model"] or "ia3" in run["model"]:
            arguments.append("--merge")
        exported = self.add(f"export {name}", arguments, [trained])
        if row is not None:
            self.attack(row, target, exported)
        return exported

    def attack(self, row: str, model: Path, exported: str) -> None:
        """Let the next audit attack a model under the name ``row``."""
        self._models[row] = model
        self._exported.append(exported)

    def exported(self, name: str) -> str:
        """Return the step that exports a model."""
        return f"{self.name}/export {name}"

    def audit(
        self, part: str, attackers: Sequence[str] | None = None, *, data: Run | None = None, **settings: Any
    ) -> None:
        """Add the attacks on all models since the last audit.

        Args:
            part: its name.
            attackers: models that the attacker has as references; without them those of the scale.
            data: the section; without it the cell's.
            **settings: of the section ``audit``.
        """
        attackers = list(self.scale.attackers) if attackers is None else attackers
        run = {
            "data": data or self.data,
            "output_dir": str(self.folder / f"audit-{part}"),
            "audit": {
                "models": {row: str(model) for row, model in self._models.items()},
                **self.references(attackers),
                "batch_size": 16,
                **settings,
            },
        }
        name = f"audit-{part}"
        self.add(name, ["audit", self.write(name, run)], [*self._exported, *map(self.exported, attackers)])
        self._models, self._exported = {}, []


def _fitting(train: Run, documents: int) -> Run:
    """Return the settings of a short run: a batch that the documents fill, and a warm-up that leaves time to learn.

    Documents of the bundled corpora fill about half a block or more.
    """
    batch = train["batch_size"]
    while batch > 1 and batch > documents / 2:
        batch //= 2
    steps = train["epochs"] * documents / batch
    return {"batch_size": batch, "warmup_steps": max(1, min(train["warmup_steps"], round(steps / 8)))}


def base_model(tuned: Cell, seed: int = 0) -> list[Step]:
    """Return the steps that pretrain the base model of a cell on the other bundled corpus."""
    scale, corpus = tuned.scale, tuned.corpus
    if scale.model.get("path"):
        return []
    cell = Cell(scale, corpus, seed, tuned.root, base=tuned.base_folder.name)
    cell.name, cell.folder = cell.base_folder.name, cell.base_folder
    data = {
        "dir": str(cell.folder / "data"),
        "source": str(cell.corpus_file(OTHER[corpus])),
        "block_length": scale.block_length,
        "lanes": 8,
        "vocab_size": scale.vocabulary,
        "processes": 1,
        "shares": scale.pretraining_shares,
    }
    seeds = {"seed": seed} if seed else {}  # not written for the first, so that folders of earlier versions stay valid
    run = {
        "data": data,
        **seeds,
        "output_dir": str(cell.folder / "run"),
        "objective": "causal_lm",
        "model": scale.model,
        "train": scale.pretraining,
        "monitor": {"log_every": 20},
    }
    path = cell.write("base", run)
    prepared = cell.add("prepare", ["prepare", path])
    trained = cell.add("train", ["train", path, "--auto-resume"], [prepared])
    cell.add("export", ["export", run["output_dir"], str(cell.model("base")), "--checkpoint", "latest"], [trained])
    return cell.steps


OTHER = {"sotu": "wikipedia", "wikipedia": "sotu"}
"""The bundled corpus that the base model of each is pretrained on."""
