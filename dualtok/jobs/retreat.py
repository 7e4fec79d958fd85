"""``dualtok retreat``: take a trained model's weights back towards its reference's, as far as members can be seen.

Trials run over members and non-members like an audit, on all ranks together.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dualtok.data.manifest import load_manifest
from dualtok.data.remote import prepared
from dualtok.engine.distributed import join_ranks
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.jobs.audit_signals import ModelPasses
from dualtok.jobs.export import export
from dualtok.model.interpolate import interpolate
from dualtok.model.weights import model_folder
from dualtok.reference.retreat import expected_auc, furthest

if TYPE_CHECKING:
    from dualtok.reference.retreat import Floats
    from dualtok.run import RunConfig

FILE = "retreat.json"


def retreat(run: RunConfig, target: Path) -> float:
    """Write the furthest model that keeps to ``retreat.auc`` as a Hugging Face folder, and return its w.

    ``<target>/retreat.json`` tells w and what every trial gave.

    Raises:
        CheckpointError: the run's own model is asked for, and it has no complete checkpoint.
        ConfigError: there is no section ``retreat``, the target exists, or the models differ in shape.
        DataError: a shard is missing or altered, or a class has no documents.
    """
    settings = run.need("retreat", "retreat")
    if target.exists():
        raise ConfigError(f"{target}: exists; give another folder")
    if settings.model is None:
        _require_own_members(run)
    folders = {name: model_folder(getattr(settings, name)) for name in ("reference", "stand_in")}
    own = dataclasses.replace(
        run, audit=dataclasses.replace(run.audit, members=settings.members, non_members=settings.non_members)
    )
    ranks = join_ranks()
    work = Path(run.output_dir) / "retreat"
    own_model = work / "model"
    if settings.model is None:
        ranks.first_does(lambda: _export(run, own_model))
    folders["model"] = model_folder(settings.model or own_model)
    models = ModelPasses(own, load_manifest(prepared(run.data)), work / "signals", ranks)

    def losses(name: str, folder: Path) -> list[Floats]:
        """Return each member's and each non-member's mean loss under a model, on rank 0; nothing elsewhere."""
        signals = models.signals(name, folder, ranks.first_does(lambda: models.key(folder)))
        splits = (settings.members, settings.non_members) if signals else ()
        return [signals[split].with_tokens().mean_loss for split in splits]

    known = [losses(name, folders[name]) for name in ("reference", "stand_in")]
    trials: list[dict[str, float]] = []
    candidate = work / "trial"

    def auc_at(w: float) -> float:
        folder = folders["model"]
        if w < 1:
            folder = Path(ranks.first_does(
                lambda: str(interpolate(folders["reference"], folders["model"], w, candidate))))  # fmt: skip
        found = losses(f"w = {w:.3f}", folder)

        def judge() -> float:
            members, non_members = ((found[side], known[0][side], known[1][side]) for side in (0, 1))
            return expected_auc(members, non_members, settings.confidence)

        auc = float(ranks.from_first(judge() if ranks.is_first else None))
        trials.append({"w": w, "auc": auc})
        return auc

    w = furthest(auc_at, settings.auc)
    # Brent's method ends within its resolution of the limit, on either side: take the furthest trial that keeps to it.
    kept = max((trial["w"] for trial in trials if trial["auc"] <= settings.auc), default=0.0)
    ranks.first_does(lambda: _write(folders, kept, target, {"settings": dataclasses.asdict(settings), "w": kept,
                                                            "root": w, "trials": trials}))  # fmt: skip
    for folder in (candidate, own_model):
        ranks.first_does(lambda folder=folder: shutil.rmtree(folder, ignore_errors=True))
    return kept


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
