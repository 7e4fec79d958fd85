"""``dualtok retreat``: take a trained model's weights back towards its reference's, as far as members can be seen.

Trials run over members and non-members like an audit, on all ranks together.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.statistics.metrics import roc_auc
from dualtok.commands.audit.model_signals import ModelPasses
from dualtok.commands.export import export
from dualtok.data.folder import DataFolder
from dualtok.data.remote.remote import prepared
from dualtok.distributed.ranks import join_ranks
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.model.check import check_model
from dualtok.model.folder.interpolate import interpolate
from dualtok.model.folder.weights import model_folder
from dualtok.reference.interpolation import expected_auc, furthest

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig
    from dualtok.reference.interpolation import Floats

FILE = "retreat.json"


@dataclass(frozen=True)
class Trial:
    """A model between the reference (w = 0) and the trained one (w = 1)."""

    w: float
    auc: float
    """Expected of an attacker with a reference of his own; what ``retreat.auc`` limits."""
    auc_with_reference: float
    """One-sided, of Ref on ``retreat.members`` and ``non_members``, by an attacker who has the defender's reference
    itself; as it was seen, without an upper end."""


def retreat(run: RunConfig, target: Path) -> Trial:
    """Write the furthest model that keeps to ``retreat.auc`` as a Hugging Face folder, and return its figures.

    ``<target>/retreat.json`` tells w and what every trial gave.

    Raises:
        CheckpointError: the run's own model is asked for, and it has no complete checkpoint.
        ConfigError: there is no section ``retreat``, the target exists, a model is not whole or does not fit the
            blocks, or the models differ in shape.
        DataError: a shard is missing or altered, or a class has no documents.
    """
    settings = run.need("retreat", "retreat")
    if target.exists():
        raise ConfigError(f"{target}: exists; give another folder")
    if settings.model is None:
        _require_own_members(run)
    folders = {"reference": model_folder(settings.reference)}
    named = [settings.stand_in] if isinstance(settings.stand_in, str) else settings.stand_in
    stand_ins = {f"stand_in {number}": model_folder(name) for number, name in enumerate(named, start=1)}
    own = dataclasses.replace(
        run, audit=dataclasses.replace(run.audit, members=settings.members, non_members=settings.non_members)
    )
    ranks = join_ranks()
    work = Path(run.output_dir) / "retreat"
    own_model = work / "model"
    if settings.model is None:
        ranks.first_does(lambda: _export(run, own_model))
    folders["model"] = model_folder(settings.model or own_model)
    data = DataFolder(prepared(run.data))
    ranks.first_does(lambda: _check_models(own, data, folders | stand_ins))
    models = ModelPasses(own, data.manifest, work / "signals", ranks)

    reference = _losses(models, "reference", folders["reference"])
    by_class = zip(*(_losses(models, name, folder) for name, folder in stand_ins.items()), strict=True)
    stand_in = [np.mean(found, axis=0) for found in by_class]
    trials: list[Trial] = []
    candidate = work / "trial"

    def auc_at(w: float) -> float:
        folder = folders["model"]
        if w < 1:
            folder = Path(
                ranks.first_does(lambda: str(interpolate(folders["reference"], folders["model"], w, candidate)))
            )
        found = _losses(models, f"w = {w:.3f}", folder)
        seen = _judge(w, found, reference, stand_in, settings.confidence) if ranks.is_first else None
        trial: Trial = ranks.from_first(seen)
        trials.append(trial)
        return trial.auc

    w = furthest(auc_at, settings.auc)
    # Brent's method ends within its resolution of the limit, on either side: take the furthest trial that keeps to it.
    within = [trial for trial in trials if trial.auc <= settings.auc]
    kept = max(within, key=lambda trial: trial.w, default=Trial(0.0, 0.5, 0.5))
    facts = {
        "settings": dataclasses.asdict(settings),
        **dataclasses.asdict(kept),
        "root": w,
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    ranks.first_does(lambda: _write(folders, kept.w, target, facts))
    for folder in (candidate, own_model):
        ranks.first_does(lambda folder=folder: shutil.rmtree(folder, ignore_errors=True))
    return kept


def _check_models(run: RunConfig, data: DataFolder, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        check_model(
            folder,
            data,
            origin=f"retreat: {name} ({folder})",
            trust_remote_code=run.audit.trust_remote_code,
            setting="audit.trust_remote_code",
        )


def _losses(models: ModelPasses, name: str, folder: Path) -> list[Floats]:
    """Return each member's and each non-member's mean loss under a model, on rank 0; nothing elsewhere."""
    signals = models.signals(name, folder, models.ranks.first_does(lambda: models.key(folder)))
    splits = (models.run.audit.members, models.run.audit.non_members) if signals else ()
    return [signals[split].with_tokens().mean_loss for split in splits]


def _judge(w: float, model: list[Floats], reference: list[Floats], stand_in: list[Floats], confidence: float) -> Trial:
    """Return what attackers see of a model, from each model's mean losses of [members, non-members]."""
    members, non_members = zip(model, reference, stand_in, strict=True)
    auc = expected_auc(members, non_members, confidence)
    return Trial(w, auc, roc_auc(*(side[1] - side[0] for side in (members, non_members))))


def _require_own_members(run: RunConfig) -> None:
    """Raise ConfigError unless the members that the retreat judges are what the run has trained on."""
    train, members = run.train, run.need("retreat", "retreat").members
    if train is None:
        raise ConfigError("retreat.model: name the trained model, or give the file of the run that trained it")
    if train.split != members:
        raise ConfigError(f"retreat.members: {members!r}, but this run has trained on {train.split!r} (train.split)")
    if train.leave_out is not None:
        raise ConfigError("train.leave_out: the run did not learn all members; name a model that did as retreat.model")


def _export(run: RunConfig, target: Path) -> None:
    """Write the run's latest checkpoint as a whole model; what a retreat that was killed has left there goes."""
    shutil.rmtree(target, ignore_errors=True)
    export(Path(run.output_dir), target, which="latest", merge=run.model is not None and run.model.lora is not None)


def _write(folders: dict[str, Path], w: float, target: Path, facts: dict[str, object]) -> None:
    interpolate(folders["reference"], folders["model"], w, target)
    write_text(target / FILE, json.dumps(facts, indent=1))
