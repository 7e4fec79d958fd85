"""The steps from one run file to a report: what it names is used, what it leaves out is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.commands.run.step import Source, Step, audited, prepared
from dualtok.config.data import is_address
from dualtok.config.reference import InterpolateConfig
from dualtok.config.run import RECIPE
from dualtok.config.workflow import WorkflowConfig
from dualtok.data.manifest import load_manifest
from dualtok.errors import ConfigError
from dualtok.objective.settings import NEEDS_REFERENCE
from dualtok.train.folder import CHECKPOINTS

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig

FOLDS = 2
"""Folds of the private documents for a cross-fitted reference."""
IDLE_WHEN_PLAIN = ("selection", "goldfish", "privacy")
LABELS = {"best": "best", "latest": "last"}
EARLY = {"plain, best": "plain, stopped early"}
"""Row of the report under the name that the field has for it."""


def steps_of(source: Source, base: Step | None = None) -> list[Step]:
    """Return the steps of a run file, in their order.

    Args:
        source: the file and its settings.
        base: the step that makes ``model.path``, where one does.

    Raises:
        ConfigError: the file does not say enough, or settings contradict each other.
    """
    run = source.run
    way = _Way(source, Path(run.output_dir), base)
    if run.train is None and not run.audit.models:
        raise ConfigError(
            f"{source.run_file}: nothing to do; a run has the sections model and train, or audit.models to audit"
        )
    if way.workflow.plain and run.objective == "causal_lm":
        raise ConfigError("workflow.plain: has no effect with objective 'causal_lm', which is plain; remove it")
    if not run.audit.of_texts:
        way.prepare()
    if run.train is not None:
        run.need("model", "run")
        way.train_all()
    way.audit()
    return way.steps


@dataclass
class _Way:
    source: Source
    out: Path
    base: Step | None
    steps: list[Step] = field(default_factory=list)
    rows: dict[str, str] = field(default_factory=dict)
    """Row of the report -> folder of the model."""
    histories: dict[str, str] = field(default_factory=dict)
    """Run whose course the report shows -> its folder."""
    attacker: str | None = None

    @property
    def run(self) -> RunConfig:
        return self.source.run

    @property
    def workflow(self) -> WorkflowConfig:
        return self.run.workflow or WorkflowConfig()

    def prepare(self) -> None:
        """Prepare the documents, unless that has been done elsewhere."""
        data = self.run.data
        if data.source is not None:
            self._add(
                "prepare", "prepare the documents", "prepare", contents=(data.source,), product=prepared(self.run)
            )
        elif not is_address(data.dir) and not prepared(self.run).is_file():
            raise ConfigError(f"data.source: missing, and {data.dir} is not prepared; give the documents, or a folder")

    def train_all(self) -> None:
        """Train the reference, the attacker's own one, and the models that are to be compared."""
        run = self.run
        if run.model is not None and run.model.path is not None:
            self.rows["base"] = run.model.path
        reference, needs = self._reference()
        if run.audit.attack_reference is None and "attack_reference" in self._splits():
            title = "train the attacker's reference on its own split"
            self._train(
                "attack_reference", title, {**self._plain("attack_reference"), **self._given("attack_reference")}
            )
            self.attacker = str(self._export("attack_reference"))
        scored = run.reference is not None or bool(reference)
        if scored and not self._mode_is_live() and not self._learns_scales():
            origins = () if run.reference is None else tuple(run.reference.models if not reference else ())
            self._add(
                "score", "compute the reference's losses, once", "score", reference, needs=needs, contents=origins
            )
            needs = ("score",)
        if self.workflow.plain:
            idle = {name: None for name in IDLE_WHEN_PLAIN if getattr(run, name) is not None}
            opacus = {"train.engine": "zero"} if run.engine == "opacus" else {}
            self._train("plain", "train plainly", {"objective": "causal_lm", **idle, **opacus, **reference}, needs)
            self._rows("plain")
        start: dict[str, Any] = {}
        if run.objective == RECIPE:
            start = self._started_from("reference")
            needs = (*needs, "reference-export")
        self._train(run.objective, f"train the model ({run.objective})", {**start, **reference}, needs)
        if run.objective == RECIPE:
            self._interpolate()
        else:
            self._rows(run.objective)

    def audit(self) -> None:
        """Attack all models and write the report."""
        run, audit = self.run, self.run.audit
        twice = next((name for name in self.rows if name in audit.models), None)
        if twice is not None:
            raise ConfigError(f"audit.models: {twice!r} is a row of `dualtok run` itself; use another name")
        changes: dict[str, Any] = {}
        if self.rows:
            changes["audit.models"] = {**self.rows, **audit.models}
        if self.histories:
            changes["audit.runs"] = {**self.histories, **audit.runs}
        if self.attacker is not None:
            changes["audit.attack_reference"] = self.attacker
        if audit.null_model is None and "base" in self.rows:
            changes["audit.null_model"] = "base"
        needs = tuple(step.name for step in self.steps if step.verb in ("prepare", "export", "interpolate"))
        needs = (*needs, *([self.base.name] if self.base is not None else []))
        own = [path for name, path in self.rows.items() if name == "base" and self.base is None]
        texts = [side.source for side in (audit.members, audit.non_members) if not isinstance(side, str)]
        contents = (*own, *audit.models.values(), *audit.references.values(), *texts)
        self._add(
            "audit", "attack every model", "audit", changes, needs=needs, contents=contents, product=audited(self.out)
        )
        trained = tuple(step.name for step in self.steps if step.is_training)
        page = Path(run.output_dir) / "report" / "report.html"
        self._add("report", "write the report", "report", changes, needs=("audit", *trained), product=page)

    def _reference(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Train the reference if the run needs one and names none; returns the settings that name it, and its step."""
        run = self.run
        if run.objective == RECIPE:
            return self._of_dual_plus()
        wanted = run.loss in NEEDS_REFERENCE or (run.reference is not None and run.reference.mode != "adapter")
        if run.reference is not None and (run.reference.model or run.reference.folds):
            wanted = False
        if not wanted or (run.reference is not None and run.reference.mode == "adapter"):
            return {}, ()
        self._train("reference", "train the reference on its own split", self._of_reference("reference"))
        return {"reference.model": str(self._export("reference"))}, ("reference-export",)

    def _of_dual_plus(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Train a reference on all auxiliary documents, a surrogate, and, but for scales, a model without each fold."""
        reference = self.run.reference
        if reference is not None and (reference.model or reference.folds or reference.mode != "stored"):
            name = "folds" if reference.folds else "model" if reference.model else "mode"
            raise ConfigError(
                f"reference.{name}: `dualtok run` trains and scores it with objective dual_plus; remove it"
            )
        self._train("first", "train on the split reference", self._of_reference("reference"))
        self._export("first")
        on_auxiliary = self._of_reference("auxiliary")
        title = "train the reference, on the split auxiliary as well"
        self._train("reference", title, {**on_auxiliary, **self._started_from("first")}, ("first-export",))
        self.rows["reference alone"] = str(self._export("reference"))
        self._train("surrogate", "train the surrogate of the attacker's reference", on_auxiliary)
        self._export("surrogate")
        if self._learns_scales():
            return {}, ("reference-export",)
        folds = []
        for fold in range(FOLDS):
            name = f"fold-{fold}"
            changes = {**self._of_reference("train"), **self._started_from("reference")}
            changes["train.leave_out"] = {"fold": fold, "folds": FOLDS}
            self._train(name, f"train without fold {fold} of the documents", changes, ("reference-export",))
            folds.append(str(self._export(name)))
        return {"reference.folds": folds}, tuple(f"fold-{fold}-export" for fold in range(FOLDS))

    def _interpolate(self) -> None:
        target = self.out / "models" / "dual_plus"
        changes = {"output_dir": str(self.out / "dual_plus"), **self._started_from("reference")}
        changes["interpolate.reference"] = str(self.out / "models" / "reference")
        changes["interpolate.surrogate_reference"] = str(self.out / "models" / "surrogate")
        settings = self.run.interpolate or InterpolateConfig()
        for name in ("reference", "surrogate_reference", "model"):
            if getattr(settings, name):
                raise ConfigError(f"interpolate.{name}: `dualtok run` trains it with objective dual_plus; remove it")
        if not self._learns_scales():
            changes["reference.folds"] = [str(self.out / "models" / f"fold-{fold}") for fold in range(FOLDS)]
        self._add(
            "interpolate",
            "interpolate the model towards its reference",
            "interpolate",
            changes,
            positional=(str(target),),
            needs=("dual_plus", "reference-export", "surrogate-export"),
            product=target,
        )
        self.rows["dual_plus"] = str(target)

    def _of_reference(self, split: str) -> dict[str, Any]:
        return {**self._plain(split), **self._given("reference")}

    def _plain(self, split: str) -> dict[str, Any]:
        """Return the settings of plain training on a split."""
        if split not in self._splits():
            raise ConfigError(
                f"data.shares.{split}: missing; `dualtok run` trains a model on this split with objective "
                f"{self.run.objective!r}; give it a share, or name a model of your own (reference.model)"
            )
        run = self.run
        changes: dict[str, Any] = {"objective": "causal_lm", "train.split": split}
        changes |= {name: None for name in ("reference", *IDLE_WHEN_PLAIN) if getattr(run, name) is not None}
        if self._learns_scales():
            changes["model.ia3"] = None
            if "learning_rate" not in self.workflow.reference:
                raise ConfigError(
                    "workflow.reference: needs a learning_rate for models of which all weights are trained; that of "
                    "the section train is for scales (model.ia3) and far too large for them"
                )
        return changes | ({"train.engine": "zero"} if run.engine == "opacus" else {})

    def _given(self, model: str) -> dict[str, Any]:
        """Return the settings of ``train`` that differ for a model."""
        given: dict[str, Any] = getattr(self.workflow, model)
        if self._learns_scales():
            given = given or self.workflow.reference
        other = {"epochs": "steps", "steps": "epochs"}
        instead = {f"train.{other[name]}": None for name in given if name in other}
        return {**instead, **{f"train.{name}": value for name, value in given.items()}}

    def _started_from(self, model: str) -> dict[str, Any]:
        path = {"model.path": str(self.out / "models" / model)}
        return path if self.run.model is None or self.run.model.config is None else {"model.config": None, **path}

    def _train(self, name: str, title: str, changes: dict[str, Any], needs: tuple[str, ...] = ()) -> None:
        folder = self.out / name
        model = self.run.model
        own = () if model is None or model.path is None or "model.path" in changes else (model.path,)
        if self.base is not None and own:
            own, needs = (), (*needs, self.base.name)
        self._add(
            name,
            title,
            "train",
            {"output_dir": str(folder), **changes},
            needs=(*self._data(), *needs),
            contents=own,
            product=folder / CHECKPOINTS,
        )

    def _rows(self, name: str) -> None:
        """Export a trained model's checkpoints, as rows of the report."""
        self.histories[name] = str(self.out / name)
        if len(self.workflow.checkpoints) == 1:
            self.rows[name] = str(self._export(name, self.workflow.checkpoints[0]))
            return
        for which in self.workflow.checkpoints:
            row = f"{name}, {LABELS[which]}"
            self.rows[EARLY.get(row, row)] = str(self._export(name, which, f"{name}-{LABELS[which]}"))

    def _export(self, name: str, which: str = "best", model: str | None = None) -> Path:
        """Export a checkpoint to ``models/``; returns the folder."""
        model = model or name
        target = self.out / "models" / model
        trained = next(step.run.model for step in self.steps if step.name == name)
        adapter = trained is not None and trained.adapter is not None
        options = [*(["--checkpoint", which] if which != "best" else []), *(["--merge"] if adapter else [])]
        self._add(
            f"{model}-export",
            f"export {model}",
            "export",
            positional=(str(self.out / name), str(target)),
            options=tuple(options),
            needs=(name,),
            product=target,
        )
        if name == "reference":
            self.rows["reference alone"] = str(target)
        return target

    def _add(self, name: str, title: str, verb: str, changes: dict[str, Any] | None = None, **others: Any) -> None:
        if verb in ("score", "audit", "interpolate"):
            others["needs"] = tuple(dict.fromkeys((*self._data(), *others.get("needs", ()))))
        self.steps.append(self.source.step(name, title, verb, changes, **others))

    def _data(self) -> tuple[str, ...]:
        return ("prepare",) if any(step.name == "prepare" for step in self.steps) else ()

    def _splits(self) -> list[str]:
        """Return the splits that there are, or will be."""
        data = self.run.data
        if data.source is not None or is_address(data.dir):
            return list(data.shares)
        return list(load_manifest(Path(data.dir)).splits)

    def _learns_scales(self) -> bool:
        """Whether dual_plus trains scales alone: its other models are then trained whole."""
        return self.run.objective == RECIPE and self.run.model is not None and self.run.model.ia3 is not None

    def _mode_is_live(self) -> bool:
        return self.run.reference is not None and self.run.reference.is_live
