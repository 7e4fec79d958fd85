"""``dualtok interpolate``: the model between a reference and a trained one at which members can hardly be told.

The models that are tried lie on the straight line between the two, or they are the checkpoints of a run. Trials run
over members and non-members like an audit, on all ranks together.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.statistics.metrics import roc_auc
from dualtok.commands.audit.passes.model_signals import ModelPasses
from dualtok.commands.export import export
from dualtok.commands.model_card import note_limit
from dualtok.data.folder import DataFolder
from dualtok.distributed.ranks import join_ranks
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.model.check import check_model
from dualtok.model.folder.interpolate import write_interpolation
from dualtok.model.folder.weights import model_folder
from dualtok.reference.interpolation import expected_auc, largest_weight
from dualtok.train.checkpoints.manifest import step_of, tag_of
from dualtok.train.checkpoints.writer import complete_checkpoints
from dualtok.train.folder import CHECKPOINTS

if TYPE_CHECKING:
    from dualtok.audit.settings import AuditConfig
    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig
    from dualtok.reference.interpolation import Floats

FILE = "interpolate.json"


@dataclass(frozen=True)
class Trial:
    """A model between the reference (w = 0) and the trained one (w = 1), or a checkpoint on the way to it."""

    w: float
    """Of a checkpoint 1."""
    auc: float
    """Expected of an attacker with a reference of their own; what ``interpolate.auc`` limits."""
    auc_with_reference: float
    """One-sided, of Ref on ``interpolate.members`` and ``non_members``, by an attacker who has the defender's reference
    itself; as measured, without an upper end."""
    loss: float
    """Mean over the non-members of their mean loss. Unit: nats per token."""
    step: int | None = None
    """Of the checkpoint; None for a model on the line."""


def interpolate(run: RunConfig, target: Path) -> Trial:
    """Write the model of the largest weight that keeps to ``interpolate.auc`` as a Hugging Face folder.

    Along a run it is the checkpoint with the lowest loss on the non-members of those that keep to it, and the
    reference if none does. ``<target>/interpolate.json`` holds w, the step and what every trial gave.

    Raises:
        CheckpointError: the run's own model is asked for, and it has no complete checkpoint.
        ConfigError: there is no section ``interpolate``, the target exists, a model is not whole or does not fit the
            blocks, or the models differ in shape.
        DataError: a shard is missing or altered, or a class has no documents.
    """
    settings = run.need("interpolate", "interpolate")
    if target.exists():
        raise ConfigError(f"{target}: exists; give another folder")
    if settings.model is None:
        _require_own_members(run.train, settings.members)
    folders = {"reference": model_folder(settings.reference)}
    named = settings.surrogate_reference
    names = [named] if isinstance(named, str) else named
    surrogates = {f"surrogate reference {number}": model_folder(name) for number, name in enumerate(names, start=1)}
    audit = dataclasses.replace(run.audit, members=settings.members, non_members=settings.non_members)
    ranks = join_ranks()
    work = Path(run.output_dir) / "interpolate"
    own_model = work / "model"
    if settings.model is None:
        ranks.first_does(lambda: _export(run, own_model))
    folders["model"] = model_folder(settings.model or own_model)
    data = DataFolder.of_run(run.data)
    ranks.first_does(lambda: _check_models(audit, data, folders | surrogates))
    models = ModelPasses(audit, data, work / "signals", ranks)

    reference = _losses(models, "reference", folders["reference"])
    by_class = zip(*(_losses(models, name, folder) for name, folder in surrogates.items()), strict=True)
    search = _Search(models, folders, work / "trial", reference, [np.mean(found, axis=0) for found in by_class])
    root = None
    if settings.along == "run":
        search.along(run)
    else:
        root = largest_weight(lambda w: search.between(w, settings.confidence), settings.auc)
    kept: Trial = ranks.first_does(lambda: _within(search.trials, settings.auc, reference))
    tried = [dataclasses.asdict(trial) for trial in search.trials]
    facts = {"settings": dataclasses.asdict(settings), **dataclasses.asdict(kept), "root": root, "trials": tried}
    ranks.first_does(lambda: _write(run, folders, kept, target, facts))
    for folder in (search.candidate, own_model):
        ranks.first_does(lambda folder=folder: shutil.rmtree(folder, ignore_errors=True))
    return kept


@dataclass
class _Search:
    """Models that are tried, one after the other, on all ranks together."""

    models: ModelPasses
    folders: dict[str, Path]
    candidate: Path
    """Where a model is written to be tried."""
    reference: list[Floats]
    """Mean loss of each of [members, non-members] under the reference; empty but on rank 0."""
    surrogate: list[Floats]
    """The same under the surrogate of the attacker's reference."""
    trials: list[Trial] = field(default_factory=list)

    def between(self, w: float, confidence: float) -> float:
        """Try the model at w on the line; returns the AUC."""
        folder = self.folders["model"]
        if w < 1:
            ends = self.folders["reference"], self.folders["model"]
            self.models.ranks.first_does(lambda: str(write_interpolation(*ends, w, self.candidate)))
            folder = self.candidate
        return self._judge(folder, w, None, confidence)

    def along(self, run: RunConfig) -> None:
        """Try all checkpoints of a run."""
        assert run.interpolate is not None
        ranks = self.models.ranks
        for tag in ranks.first_does(lambda: complete_checkpoints(Path(run.output_dir) / CHECKPOINTS)):
            ranks.first_does(lambda tag=tag: _export(run, self.candidate, tag))
            self._judge(self.candidate, 1.0, step_of(tag), run.interpolate.confidence)

    def _judge(self, folder: Path, w: float, step: int | None, confidence: float) -> float:
        """Add a trial: what attackers find in a model."""
        ranks = self.models.ranks
        found = _losses(self.models, f"w = {w:.3f}" if step is None else f"step {step}", folder)
        seen = None
        if ranks.is_first:
            members, non_members = zip(found, self.reference, self.surrogate, strict=True)
            seen = Trial(
                w,
                expected_auc(members, non_members, confidence),
                roc_auc(*(side[1] - side[0] for side in (members, non_members))),
                float(np.mean(found[1])),
                step,
            )
        trial: Trial = ranks.from_first(seen)
        self.trials.append(trial)
        return trial.auc


def _within(trials: list[Trial], limit: float, reference: list[Floats]) -> Trial:
    """Return the best of the models that keep to the limit: along the line the farthest, along a run by its loss.

    Brent's method ends within its resolution of the limit, on either side of it.
    """
    within = [trial for trial in trials if trial.auc <= limit]
    if not within:
        return Trial(0.0, 0.5, 0.5, float(np.mean(reference[1])))
    return max(within, key=lambda trial: (trial.w, -trial.loss))


def _check_models(audit: AuditConfig, data: DataFolder, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        check_model(
            folder,
            data,
            origin=f"interpolate: {name} ({folder})",
            trust_remote_code=audit.trust_remote_code,
            setting="audit.trust_remote_code",
        )


def _losses(models: ModelPasses, name: str, folder: Path) -> list[Floats]:
    """Return each member's and each non-member's mean loss under a model, on rank 0; nothing elsewhere."""
    signals = models.signals(name, folder, models.ranks.first_does(lambda: models.key(folder)))
    splits = models.settings.splits if signals else ()
    return [signals[split].with_tokens().mean_loss for split in splits]


def _require_own_members(train: TrainConfig | None, members: str) -> None:
    """Raise ConfigError unless the members that are judged are what the run has trained on."""
    if train is None:
        raise ConfigError("interpolate.model: name the trained model, or give the file of the run that trained it")
    if train.split != members:
        raise ConfigError(
            f"interpolate.members: {members!r}, but this run has trained on {train.split!r} (train.split)"
        )
    if train.leave_out is not None:
        raise ConfigError(
            "train.leave_out: the run did not learn all members; name a model that did as interpolate.model"
        )


def _export(run: RunConfig, target: Path, which: str = "latest") -> None:
    """Write a checkpoint of the run as a whole model; what a killed call has left there is removed."""
    shutil.rmtree(target, ignore_errors=True)
    export(Path(run.output_dir), target, which=which, merge=run.model is not None and run.model.adapter is not None)


def _write(run: RunConfig, folders: dict[str, Path], kept: Trial, target: Path, facts: dict[str, object]) -> None:
    if kept.step is None:
        write_interpolation(folders["reference"], folders["model"], kept.w, target)
        note_limit(
            target,
            f"interpolated towards its reference: {kept.w:.3f} of the way from the reference to the trained model",
        )
    else:
        _export(run, target, tag_of(kept.step))
        note_limit(target, f"stopped early, after step {kept.step}, to keep to an expected AUC of the attack Ref")
    write_text(target / FILE, json.dumps(facts, indent=1))
