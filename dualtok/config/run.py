"""One run, one YAML file: the tree of every component's settings, read strictly.

An unknown key, a value of the wrong type, and a setting without effect in the chosen mode are errors that name the
file, the dotted key and, for a typo, the nearest known key.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dualtok.audit.settings import AuditConfig
from dualtok.config.data import DataConfig
from dualtok.config.launch import LaunchConfig
from dualtok.config.model import ModelConfig
from dualtok.config.monitor import MonitorConfig
from dualtok.config.privacy import PrivacyConfig
from dualtok.config.reference import ReferenceConfig, RetreatConfig
from dualtok.config.train import TrainConfig
from dualtok.errors import ConfigError, did_you_mean
from dualtok.objective.settings import NEEDS_REFERENCE, GoldfishConfig, ObjectiveName, SelectionConfig

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""What pydantic calls a key that it does not know."""
RECIPES: dict[str, ObjectiveName] = {"dual_plus": "dual"}
"""Recipe that may stand in the place of an objective -> the objective that it trains with. ``dual_plus`` is the dual
loss against a cross-fitted reference; ``dualtok retreat`` follows (docs/dual_plus.md)."""


@dataclass(config=ConfigDict(extra="forbid"))
class RunConfig:
    """Everything that a run needs; each verb reads the sections that concern it."""

    data: DataConfig
    """Where the prepared shards are, and how ``dualtok prepare`` makes them."""

    output_dir: str = "runs/default"
    """Folder of this run: checkpoints, events, metrics, audit and report."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights, of the order of blocks and of dropout."""

    objective: ObjectiveName | Literal["dual_plus"] = "dual"
    """``dual`` (DuoLearn), ``dual_plus`` (the same against a cross-fitted reference, and taken back towards it by
    ``dualtok retreat``), ``selective`` (its learning half alone), ``goldfish``, or ``causal_lm`` (plain)."""

    model: ModelConfig | None = None
    """The model to train."""

    train: TrainConfig | None = None
    """Steps, batch, optimizer, DeepSpeed configuration, evaluation and checkpoints."""

    selection: SelectionConfig | None = None
    """Shares, threshold and weight of the dual loss; only for ``dual``, ``dual_plus`` and ``selective``."""

    goldfish: GoldfishConfig | None = None
    """Drop rate and context of the Goldfish mask; only for the objective ``goldfish``."""

    privacy: PrivacyConfig | None = None
    """Noise, clipping and accountant of DP-SGD; only with ``train.engine: opacus``."""

    retreat: RetreatConfig | None = None
    """Which trained model goes back towards which reference; for ``dualtok retreat`` alone."""

    reference: ReferenceConfig | None = None
    """The frozen reference model. With the objectives that need none it serves monitoring alone."""

    audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)
    """Attacks, intervals and false-positive rates of ``dualtok audit``."""

    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    """TensorBoard events and terminal output."""

    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)
    """Hosts, network and restarts of ``dualtok launch``."""

    def __post_init__(self) -> None:
        """Refuse sections that would have no effect under the chosen objective."""
        if self.selection is not None and self.loss not in NEEDS_REFERENCE:
            raise ValueError(f"selection: has no effect with objective {self.objective!r}; remove it (selection=null)")
        if self.goldfish is not None and self.objective != "goldfish":
            raise ValueError(f"goldfish: has no effect with objective {self.objective!r}; remove it (goldfish=null)")
        engine = "zero" if self.train is None else self.train.engine
        if self.selection is not None and self.selection.scope == "step" and engine != "zero":
            raise ValueError(
                "selection.scope: 'step' ranks all tokens of an optimizer step before its first backward pass, but "
                f"train.engine={engine} interleaves forward and backward passes; use scope=micro_batch or engine=zero"
            )
        if self.objective == "selective" and self.selection is not None and self.selection.alpha not in (0.0, 0.8):
            raise ValueError(
                "selection.alpha: has no effect with objective 'selective', which never unlearns; remove it"
            )
        if self.model is not None and self.model.trust_remote_code and engine != "zero":
            raise ValueError(
                f"model.trust_remote_code: train.engine={engine} cuts only architectures of transformers itself into "
                "stages; use engine=zero"
            )
        if self.data.mix and self.train is not None and self.train.epochs is not None:
            raise ValueError(
                "train.epochs: folders mixed in by data.mix come round at different times; give train.steps instead"
            )

        self._check_privacy()
        if self.objective == "dual_plus" and self.reference is not None and not self.reference.folds:
            raise ValueError(
                "reference.folds: objective 'dual_plus' holds each document to a model that has seen others, not it; "
                "train one without each fold (train.leave_out) and name them here, or use objective=dual"
            )
        lora = self.model is not None and self.model.lora is not None
        if self.reference is not None and self.reference.mode == "adapter" and not lora:
            raise ValueError("reference.mode: 'adapter' needs the section model.lora, whose base is the reference")

    def _check_privacy(self) -> None:
        private = self.train is not None and self.train.engine == "opacus"
        if private != (self.privacy is not None):
            raise ValueError(
                "privacy: missing; train.engine=opacus needs a target, e.g. privacy: {epsilon: 8, delta: 1.0e-5}"
                if private
                else "privacy: has an effect with train.engine=opacus alone; remove it (privacy=null)"
            )
        if not private:
            return
        if self.objective != "causal_lm":
            raise ValueError(f"objective: train.engine=opacus trains plainly; {self.objective!r} is not private there")
        if self.model is not None and (self.model.quantize or self.model.activation_checkpointing):
            raise ValueError("model: quantize and activation_checkpointing do not go with train.engine=opacus")
        if self.data.mix or self.data.on_bad_shard == "skip":
            raise ValueError("data: train.engine=opacus draws documents of one sound folder; remove mix, on_bad_shard")
        if self.reference is not None:
            raise ValueError("reference: has no effect with train.engine=opacus; remove it (reference=null)")

    @property
    def loss(self) -> ObjectiveName:
        """The objective that is trained with: that of the recipe, where ``objective`` names one."""
        return RECIPES.get(self.objective, cast("ObjectiveName", self.objective))

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


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


class _RunLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML file and apply dotted overrides such as ``train.steps=100``.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``; the value is read as YAML, ``null`` removes a section.

    Raises:
        ConfigError: the file is missing or malformed, or a setting is unknown, of the wrong type or out of range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a run's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_RunLoader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_without_content(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a run is a mapping of sections such as 'data:' and 'train:'")
    for override in overrides:
        _apply_override(tree, override)
    return parse_run(tree, source=str(path))


def parse_run(tree: dict[str, Any], source: str = "run") -> RunConfig:
    """Validate a run given as nested dictionaries; ``source`` names it in errors."""
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: the value is not YAML: {_without_content(error)}") from None


def _without_content(error: yaml.YAMLError) -> str:
    """Return what PyYAML found and where, without the line itself, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "a character that YAML does not allow"
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def _explain(error: ValidationError) -> str:
    """Turn pydantic's report into one line: all problems, unknown keys first, for one may be why another is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN)
    texts = list(dict.fromkeys(" ".join(_explain_one(problem).split()) for problem in problems))
    return (
        texts[0]
        if len(texts) == 1
        else f"{len(texts)} problems: " + "; ".join(f"({number}) {text}" for number, text in enumerate(texts, start=1))
    )


def _explain_one(problem: ErrorDetails) -> str:
    location = [str(part) for part in problem["loc"] if not str(part).endswith("]")]
    key = ".".join(location)
    if problem["type"] in UNKNOWN:
        return f"unknown key {key!r}{did_you_mean(location[-1], _known_keys(location[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; add it to the run"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return message if not key or message.startswith(key.split(".")[0]) else f"{key}: {message}"
    secret = key.startswith("data.stream.storage")
    return f"{key}: {problem['msg']}" + ("" if secret else f", got {problem['input']!r}")


def _known_keys(location: list[str]) -> list[str]:
    """Return the field names of the config class at a dotted location."""
    here: Any = RunConfig
    for part in location:
        if part.isdigit():  # an entry of a list, whose class was found with the list
            continue
        here = _config_class(get_type_hints(here).get(part))
        if here is None:
            return []
    return [field.name for field in dataclasses.fields(here)]


def _config_class(annotation: Any) -> Any | None:
    """Return the config class in an annotation such as ``LoraConfig | None`` or ``tuple[MixConfig, ...]``."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(_config_class, get_args(annotation))), None)
