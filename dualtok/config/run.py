"""One run, one YAML file: the tree of every component's settings, and the rules between its sections."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from dualtok.audit.settings import AuditConfig
from dualtok.config.data import DataConfig, SplitName
from dualtok.config.launch import LaunchConfig
from dualtok.config.model import ModelConfig
from dualtok.config.monitor import MonitorConfig
from dualtok.config.privacy import PrivacyConfig
from dualtok.config.reference import USED, InterpolateConfig, ReferenceConfig
from dualtok.config.train import TrainConfig
from dualtok.config.workflow import WorkflowConfig
from dualtok.errors import ConfigError, did_you_mean
from dualtok.objective.settings import NEEDS_REFERENCE, GoldfishConfig, ObjectiveName, SelectionConfig

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE = "dual_plus"
"""It may stand in the place of an objective; ``dualtok interpolate`` follows (docs/dual_plus.md)."""


@dataclass(config=ConfigDict(extra="forbid"))
class RunConfig:
    """Everything that a run needs; each verb reads the sections that concern it."""

    data: DataConfig
    """Where the prepared shards are, and how ``dualtok prepare`` makes them."""

    output_dir: str = "runs/default"
    """Folder of this run: checkpoints, events, metrics, audit and report."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights, of the order of blocks and of dropout. Unit: none."""

    objective: ObjectiveName | Literal["dual_plus"] = "dual"
    """``dual`` (DuoLearn), ``selective`` (its learning half alone), ``goldfish``, ``causal_lm`` (plain), or
    ``dual_plus``: a recipe that ends with ``dualtok interpolate``. With ``model.ia3`` it trains learned scales plainly,
    with ``reference.folds`` by the dual loss against a cross-fitted reference."""

    model: ModelConfig | None = None
    """The model to train."""

    train: TrainConfig | None = None
    """Steps, batch, optimizer, DeepSpeed configuration, evaluation and checkpoints."""

    selection: SelectionConfig | None = None
    """Shares, threshold and weight of the dual loss; only for ``dual``, ``selective``, and ``dual_plus`` with
    ``reference.folds``."""

    goldfish: GoldfishConfig | None = None
    """Drop rate and context of the Goldfish mask; only for the objective ``goldfish``."""

    privacy: PrivacyConfig | None = None
    """Noise, clipping and accountant of DP-SGD; only with ``train.engine: opacus``."""

    interpolate: InterpolateConfig | None = None
    """Which trained model is interpolated towards which reference; for ``dualtok interpolate`` alone."""

    reference: ReferenceConfig | None = None
    """The frozen reference model. With the objectives that need none it serves monitoring alone."""

    audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)
    """Attacks, intervals and false-positive rates of ``dualtok audit``."""

    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    """TensorBoard events and terminal output."""

    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)
    """Hosts, network and restarts of ``dualtok launch``."""

    workflow: WorkflowConfig | None = None
    """Which models ``dualtok run`` makes on the way from documents to a report, and what starts its steps. With this
    section, models that it trains need not be named elsewhere."""

    def __post_init__(self) -> None:
        """Refuse sections and settings that contradict each other or would have no effect."""
        for rule in RULES:
            if rule.is_broken(self):
                raise ValueError(rule.message(self))

    @property
    def engine(self) -> str:
        """``train.engine``, or its default in a run that trains nothing."""
        return "zero" if self.train is None else self.train.engine

    @property
    def loss(self) -> ObjectiveName:
        """The objective that is trained with: that of the recipe, where ``objective`` names it."""
        return trained_objective(self.objective, cross_fitted=self.cross_fitted)

    @property
    def cross_fitted(self) -> bool:
        """Whether each document's reference loss comes from a model that has not seen it, or will come from one that
        ``dualtok run`` trains."""
        if self.reference is not None and self.reference.folds:
            return True
        left_to_run = self.workflow is not None and self.objective == RECIPE
        return left_to_run and self.model is not None and self.model.ia3 is None

    def need(self, section: str, verb: str) -> Any:
        """Return a section that ``verb`` cannot do without.

        Raises:
            ConfigError: the run has no such section.
        """
        value = getattr(self, section)
        if value is None:
            raise ConfigError(f"`dualtok {verb}` needs the section {section!r}, which the run does not have")
        return value

    def as_dict(self) -> dict[str, Any]:
        """Return the complete run, defaults included, as plain YAML-able values."""
        values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(self, mode="json")
        return values

    def to_yaml(self) -> str:
        """Return the complete run as YAML, in the order of the fields."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def trained_objective(objective: str, *, cross_fitted: bool) -> ObjectiveName:
    """Return the objective that a run trains with: that of the recipe, where the setting ``objective`` names it."""
    if objective == RECIPE:
        return "dual" if cross_fitted else "causal_lm"
    return cast("ObjectiveName", objective)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What must hold between the sections of a run."""

    is_broken: Callable[[RunConfig], bool]
    message: Callable[[RunConfig], str]
    """Names the dotted key, what is wrong, and what to do."""


RULES = (
    Rule(
        lambda run: run.selection is not None and run.loss not in NEEDS_REFERENCE,
        lambda run: f"selection: has no effect with objective {run.objective!r}; remove it (selection=null)",
    ),
    Rule(
        lambda run: run.goldfish is not None and run.objective != "goldfish",
        lambda run: f"goldfish: has no effect with objective {run.objective!r}; remove it (goldfish=null)",
    ),
    Rule(
        lambda run: run.selection is not None and run.selection.scope == "step" and run.engine != "zero",
        lambda run: (
            "selection.scope: 'step' ranks all tokens of an optimizer step before its first backward pass, but "
            f"train.engine={run.engine} interleaves forward and backward passes; use scope=micro_batch or engine=zero"
        ),
    ),
    Rule(
        lambda run: (
            run.objective == "selective"
            and run.selection is not None
            and run.selection.alpha not in (0.0, SelectionConfig.alpha)
        ),
        lambda run: "selection.alpha: has no effect with objective 'selective', which never unlearns; remove it",
    ),
    Rule(
        lambda run: run.model is not None and run.model.trust_remote_code and run.engine != "zero",
        lambda run: (
            f"model.trust_remote_code: train.engine={run.engine} cuts only architectures of transformers itself into "
            "stages; use engine=zero"
        ),
    ),
    Rule(
        lambda run: bool(run.data.mix) and run.train is not None and run.train.epochs is not None,
        lambda run: (
            "train.epochs: folders mixed in by data.mix come round at different times; give train.steps instead"
        ),
    ),
    Rule(
        lambda run: run.engine == "opacus" and run.privacy is None,
        lambda run: "privacy: missing; train.engine=opacus needs a target, e.g. privacy: {epsilon: 8, delta: 1.0e-5}",
    ),
    Rule(
        lambda run: run.engine != "opacus" and run.privacy is not None,
        lambda run: "privacy: has an effect with train.engine=opacus alone; remove it (privacy=null)",
    ),
    Rule(
        lambda run: run.engine == "opacus" and run.objective != "causal_lm",
        lambda run: f"objective: train.engine=opacus trains plainly; {run.objective!r} is not private there",
    ),
    Rule(
        lambda run: (
            run.engine == "opacus"
            and run.model is not None
            and bool(run.model.quantize or run.model.activation_checkpointing)
        ),
        lambda run: "model: quantize and activation_checkpointing do not go with train.engine=opacus",
    ),
    Rule(
        lambda run: run.engine == "opacus" and bool(run.data.mix or run.data.on_bad_shard == "skip"),
        lambda run: "data: train.engine=opacus draws documents of one sound folder; remove mix, on_bad_shard",
    ),
    Rule(
        lambda run: run.engine == "opacus" and run.reference is not None,
        lambda run: "reference: has no effect with train.engine=opacus; remove it (reference=null)",
    ),
    Rule(
        lambda run: (
            run.objective == RECIPE and not run.cross_fitted and run.model is not None and run.model.ia3 is None
        ),
        lambda run: (
            f"model.ia3: objective {run.objective!r} trains learned scales alone; write model.ia3: {{}}, or name "
            "models that were trained without a fold each (train.leave_out) as reference.folds"
        ),
    ),
    Rule(
        lambda run: (
            run.workflow is None
            and run.reference is not None
            and "model" in USED[run.reference.mode]
            and run.reference.model is None
            and not run.reference.folds
        ),
        lambda run: "reference.model: missing; give the folder or hub name of the reference model",
    ),
    Rule(
        lambda run: (
            run.workflow is None
            and run.interpolate is not None
            and not (run.interpolate.reference and run.interpolate.surrogate_reference)
        ),
        lambda run: (
            f"interpolate.{'surrogate_reference' if run.interpolate and run.interpolate.reference else 'reference'}: "
            "missing; add it to the run"
        ),
    ),
    Rule(
        lambda run: (
            run.reference is not None
            and run.reference.mode == "adapter"
            and (run.model is None or run.model.lora is None)
        ),
        lambda run: "reference.mode: 'adapter' needs the section model.lora, whose base is the reference",
    ),
    Rule(
        lambda run: not run.audit.of_texts and bool(set(run.audit.splits) - set(get_args(SplitName))),
        lambda run: _unknown_split(dict(zip(("audit.members", "audit.non_members"), run.audit.splits, strict=True))),
    ),
)


def _unknown_split(names: dict[str, str]) -> str:
    known = get_args(SplitName)
    key, name = next((key, name) for key, name in names.items() if name not in known)
    return f"{key}: no split is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
