"""Shadow models of an audit: each an ordinary training run on its own half of members and non-members.

``<output_dir>/audit/shadows/<n>`` holds ``data`` (the half, packed anew), ``shadow.yaml`` (the run), what training
leaves, and the exported model. What is there is not made again, and a run that was interrupted is resumed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dualtok.audit.attacks.lira import fit_shadows, statistic
from dualtok.commands.export import export
from dualtok.config.load import parse_run
from dualtok.config.old_names import with_new_names
from dualtok.data.folds import in_shadow
from dualtok.data.manifest import OLD_AUXILIARY, load_manifest, split_entry
from dualtok.data.subset import Subset, is_written, write_subset
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.launch.local import launch
from dualtok.objective.settings import NEEDS_REFERENCE
from dualtok.reference.fingerprint import blocks_digest
from dualtok.train.checkpoints.manifest import COMPLETE
from dualtok.train.checkpoints.writer import find_checkpoint
from dualtok.train.checks import changes, count_steps, require_reference
from dualtok.train.folder import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import ShadowFit
    from dualtok.audit.signals.signals import Signals
    from dualtok.config.run import RunConfig
    from dualtok.data.folder import DataFolder
    from dualtok.data.manifest import Manifest

    DocumentLosses = tuple[NDArray[np.int64], NDArray[np.float64]]
    """Ids and mean losses (nats per token) of documents [n]."""

RUN_FILE = "shadow.yaml"
VERB = "audit --shadows"


@dataclass(frozen=True)
class Shadow:
    """One shadow model."""

    number: int
    folder: Path
    run: RunConfig
    """Its training run."""

    @property
    def run_file(self) -> Path:
        """The run as a file that ``dualtok train`` takes."""
        return self.folder / RUN_FILE

    @property
    def steps(self) -> int:
        """Optimizer steps of its training."""
        assert self.run.train is not None
        assert self.run.train.steps is not None
        return self.run.train.steps

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, which are merged into the exported model."""
        assert self.run.model is not None
        return self.run.model.adapter is not None

    def model(self, checkpoint: str) -> Path:
        """Return where its model is exported."""
        return self.folder / f"model-{checkpoint}"


def train_shadows(run: RunConfig, data: DataFolder, folder: Path, processes: int) -> list[Path]:
    """Return the models of ``audit.shadows`` shadows, after training those that are not there yet, one by one.

    Args:
        run: an audit's run that also has the sections the audited model was trained with.
        data: the run's.
        folder: where the shadows are kept.
        processes: ranks that share each training run.

    Raises:
        ConfigError: the run does not say how the audited model was trained, or the folder holds shadows of another
            recipe; or the audit runs under a launcher, and not all models are there.
        DataError: a split is missing or too small.
        DualtokError: a training run failed.
    """
    settings = run.audit
    assert settings.shadows is not None
    manifest = data.manifest
    shadows = shadow_runs(run, manifest, folder)
    missing = [shadow for shadow in shadows if not shadow.model(settings.shadow_checkpoint).is_dir()]
    for shadow in shadows:
        _require_same(run, manifest, shadow)
    if missing and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"audit.shadows: {len(missing)} of {len(shadows)} shadow models are not there yet, and they are trained in "
            f"processes of their own; start `dualtok {VERB}` without a launcher first (--processes shares the training)"
        )
    if missing:
        _print(f"{len(missing)} of {len(shadows)} shadow models to train, {shadows[0].steps} steps each, in {folder}")
    for shadow in missing:  # all at first, for those who start the training runs by themselves
        _write_start(run, data, shadow)
    for shadow in missing:
        _print(f"shadow {shadow.number} ({shadow.number + 1} of {len(shadows)})")
        _train(shadow, processes)
        which = settings.shadow_checkpoint
        export(shadow.folder, shadow.model(which), which=which, merge=shadow.has_adapters)
    return [shadow.model(settings.shadow_checkpoint) for shadow in shadows]


def shadow_runs(run: RunConfig, manifest: Manifest, folder: Path) -> list[Shadow]:
    """Return the training runs of an audit's shadows: the run's own recipe, with as many passes over the documents.

    Raises:
        ConfigError: the run does not say how the audited model was trained.
        DataError: a split is missing.
    """
    run.need("model", VERB)
    settings, train = run.audit, run.need("train", VERB)
    require_reference(run)
    if train.split != settings.members:
        raise ConfigError(
            f"audit.members: {settings.members!r}, but train.split is {train.split!r}; shadow models need the recipe "
            "of a model that was trained on the members"
        )
    if run.objective == "dual_plus":
        raise ConfigError(
            "objective: shadows of 'dual_plus' would not be interpolated, as the audited model was; shadows of "
            "objective=dual with the same reference model, or of objective=causal_lm with the same scales (model.ia3), "
            "judge it too"
        )
    if train.leave_out is not None:
        raise ConfigError(
            "train.leave_out: the audited model did not learn all members; audit it without audit.shadows"
        )
    members, others = (split_entry(manifest, split, run.data.dir).blocks for split in settings.splits)
    # A shadow learns half of both splits, so that as many passes over a document take this many steps.
    half = (members + others) / 2 / members
    steps = max(1, round(count_steps(train, members) * half))
    tree = run.as_dict()
    del tree["audit"]
    tree["train"] |= {"epochs": None, "steps": steps, "warmup_steps": min(round(train.warmup_steps * half), steps - 1)}
    if run.loss not in NEEDS_REFERENCE:
        tree["reference"] = None  # it would serve monitoring alone
    elif run.reference is not None and not run.reference.is_live:
        tree["reference"]["splits"] = [s for s in run.reference.splits if s in (train.split, "validation")]
    assert settings.shadows is not None
    return [_shadow(run, tree, number, folder / str(number)) for number in range(settings.shadows)]


def document_losses(signals: Iterable[Signals]) -> DocumentLosses:
    """Return the documents of some splits that have a predicted token, and the mean loss of each."""
    sides = [side.with_tokens() for side in signals]
    return (
        np.concatenate([np.zeros(0, np.int64), *(side.document for side in sides)]),
        np.concatenate([np.zeros(0), *(side.mean_loss for side in sides)]),
    )


def fit_losses(shadows: Sequence[DocumentLosses], seed: int) -> ShadowFit:
    """Fit the Gaussians of all documents.

    Args:
        shadows: what :func:`document_losses` gives of each, the same documents in the same order.
        seed: the audited run's.
    """
    documents = shadows[0][0]
    inside = np.stack([in_shadow(documents, number, seed) for number in range(len(shadows))])
    return fit_shadows(documents, np.stack([statistic(losses) for _, losses in shadows]), inside)


def _shadow(run: RunConfig, tree: dict[str, Any], number: int, folder: Path) -> Shadow:
    own = {
        **tree,
        "data": {**tree["data"], "dir": str(folder / "data")},
        "output_dir": str(folder),
        "seed": run.seed + 1 + number,
    }
    return Shadow(number, folder, parse_run(own, source=f"shadow {number}"))


def _note(run: RunConfig, manifest: Manifest, shadow: Shadow) -> dict[str, Any]:
    """Return what decides a shadow's documents."""
    return {
        "number": shadow.number,
        "seed": run.seed,
        "members": run.audit.splits[0],
        "non_members": run.audit.splits[1],
        "blocks": blocks_digest(manifest),
    }


def _require_same(run: RunConfig, manifest: Manifest, shadow: Shadow) -> None:
    """Refuse a shadow of another recipe or of other documents."""
    again = "remove the folder, or use another output_dir"
    if is_written(shadow.folder / "data"):
        before = load_manifest(shadow.folder / "data").config.get("shadow")
        if before:  # the split `auxiliary` was called `probe` before 0.2
            before = {key: "auxiliary" if value == OLD_AUXILIARY else value for key, value in before.items()}
        if before != _note(run, manifest, shadow):
            raise ConfigError(f"{shadow.folder}: made for other members or non-members, or another seed; {again}")
    if shadow.run_file.is_file():
        earlier = with_new_names(yaml.safe_load(shadow.run_file.read_text(encoding="utf-8")))[0]
        earlier["data"]["dir"] = shadow.run.data.dir
        for key, before, now in changes(earlier, shadow.run.as_dict()):
            raise ConfigError(f"{key}: {now!r}, but the shadow model in {shadow.folder} has {before!r}; {again}")


def _write_start(run: RunConfig, data: DataFolder, shadow: Shadow) -> None:
    """Write a shadow's documents and its run, unless they are there."""
    settings, target = run.audit, shadow.folder / "data"
    if not is_written(target):
        wants = partial(in_shadow, shadow=shadow.number, seed=run.seed)
        pool = Subset(settings.splits, wants)
        subsets: dict[str, Subset] = {settings.splits[0]: pool, "validation": Subset(("validation",), _everything)}
        write_subset(
            data,
            target,
            subsets,
            rows_per_shard=run.data.rows_per_shard,
            note={"shadow": _note(run, data.manifest, shadow)},
        )
    write_text(shadow.run_file, shadow.run.to_yaml())


def _everything(documents: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.ones(len(documents), dtype=bool)


def _train(shadow: Shadow, processes: int) -> None:
    """Train a shadow to its last step, unless it is there."""
    checkpoints = shadow.folder / CHECKPOINTS
    if any(checkpoints.glob(f"step-*/{COMPLETE}")) and find_checkpoint(checkpoints).manifest.step >= shadow.steps:
        return
    logs, reference = shadow.folder / "logs", shadow.run.reference
    if reference is not None and not reference.is_live:
        launch(["score", str(shadow.run_file)], processes, logs / "score.log")
    launch(["train", str(shadow.run_file), "--auto-resume"], processes, logs / "train.log")


def _print(text: str) -> None:
    print(f"dualtok: shadows: {text}", flush=True)
