"""Settings of the frozen reference model."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.config.data import SplitName
from dualtok.errors import ConfigError

Mode = Literal["stored", "offload", "cpu", "resident", "adapter"]

USED: dict[str, tuple[str, ...]] = {
    "stored": ("model", "folds", "trust_remote_code", "splits", "precision", "batch_size", "deepspeed"),
    "offload": ("model", "trust_remote_code", "precision", "batch_size", "deepspeed"),
    "cpu": ("model", "trust_remote_code", "precision", "batch_size", "prefetch", "threads", "cores"),
    "resident": ("model", "trust_remote_code", "precision", "batch_size", "deepspeed"),
    "adapter": ("adapter",),
}
"""Mode -> the settings that have an effect in it."""


@dataclass(config=ConfigDict(extra="forbid"))
class ReferenceConfig:
    """Which model gives the reference losses CE(theta_ref; t), and where they are computed."""

    model: str | None = None
    """Folder or hub name of the reference model, e.g. one that ``dualtok export`` wrote. Every mode but ``adapter``
    needs it; ``dualtok run`` trains one where it is left out."""

    folds: tuple[str, ...] = ()
    """Only ``stored``: models that each left one fold of the documents out (``train.leave_out``), fold 0 first. Each
    document is judged by the model that did not see it. Takes the place of ``model``."""

    trust_remote_code: bool = False
    """Run Python code that the folder or hub repository ``model`` brings, with all your rights. Read it first."""

    mode: Mode = "stored"
    """``stored``: scored once by ``dualtok score`` and read back beside the tokens, at no cost in the training step.
    The others compute the losses while training, for data that is seen once: ``offload`` in a ZeRO-3 engine whose
    parameters lie in host memory, ``cpu`` on host cores in the background, ``resident`` on the accelerator, ``adapter``
    with the model in training itself, its LoRA adapter switched off or exchanged."""

    splits: tuple[SplitName, ...] = ("train", "validation")
    """Only ``stored``: splits to score. Training needs its own split; ``validation`` serves the Ref AUC that is
    monitored."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass; in mode ``adapter`` it is ``train.precision``. The losses themselves are float32:
    float16 has a spacing of .004 at a loss of 4-8, so that borderline tokens would change sides."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Blocks per forward pass and rank; in mode ``adapter`` it is the training's. Unit: blocks."""

    deepspeed: str | None = None
    """DeepSpeed JSON file of a ZeRO-3 forward-only engine, for a reference too large for one device. Modes ``stored``
    and ``resident``: without it each rank holds the whole model. Mode ``offload``: it must have ``offload_param``;
    without a file, stage 3 with ``offload_param: {device: cpu}``."""

    prefetch: Annotated[int, Field(ge=1)] = 2
    """Only ``cpu``: micro-batches that are scored ahead while the model trains on an earlier one. More even out the
    time of steps, each costs the memory of one micro-batch on the host. Unit: micro-batches."""

    threads: Annotated[int, Field(ge=1)] | None = None
    """Only ``cpu``: threads of each rank's worker; without it as many as its cores, or 1 where none are listed. Unit:
    threads."""

    cores: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Only ``cpu``: host cores that the workers of one host are pinned to, shared evenly by the ranks of that host.
    Choose cores that the training processes do not use. Unit: none."""

    adapter: str | None = None
    """Only ``adapter``: folder of a LoRA adapter of the same base, e.g. one that ``dualtok export`` wrote, that makes
    the base the reference. ``null``: the base alone is the reference."""

    def __post_init__(self) -> None:
        """Require what the mode needs, and refuse what has no effect in it."""
        if self.folds and self.model is not None:
            raise ValueError("reference.folds: takes the place of reference.model; remove one of them")
        if len(self.folds) == 1:
            raise ValueError("reference.folds: name one model per fold of the documents, at least 2")
        for field in fields(self):
            idle = field.name not in ("mode", *USED[self.mode])
            if idle and getattr(self, field.name) != field.default:
                instead = ": the reference is the model in training" if field.name == "model" else ""
                raise ValueError(f"reference.{field.name}: has no effect with mode {self.mode!r}{instead}; remove it")
        if self.cores is not None and len(set(self.cores)) != len(self.cores):
            raise ValueError("reference.cores: lists a core twice")

    @property
    def is_live(self) -> bool:
        """Whether the losses are computed while training, and not read back."""
        return self.mode != "stored"

    @property
    def models(self) -> tuple[str, ...]:
        """Folder or hub name of every model that gives losses: one, or one per fold."""
        return self.folds or (self.origin,)

    @property
    def origin(self) -> str:
        """Folder or hub name of the reference model, in the modes that have one of their own.

        Raises:
            ConfigError: the run leaves it to ``dualtok run``.
        """
        if self.model is None:
            raise ConfigError(
                "reference.model: missing; `dualtok run` trains a reference, any other verb needs the folder or hub "
                "name of one"
            )
        return self.model


@dataclass(config=ConfigDict(extra="forbid"))
class InterpolateConfig:
    """Between which reference and which trained model to interpolate, and how far."""

    reference: str = ""
    """Folder or hub name of a model of the same shape that has seen no member; the trained one should have started from
    its weights, or from the same weights as it. Needed, but in a file for ``dualtok run``, which trains it."""

    surrogate_reference: str | Annotated[tuple[str, ...], Field(min_length=1)] = ""
    """Folder or hub name of a surrogate of the attacker's reference: trained like one, by you, on documents that are
    in neither ``members`` nor ``non_members``, e.g. on the split ``auxiliary``. The reference, and so the model that
    starts from it, may have learned them too; the model should then stay a little nearer to the reference. Of several
    the mean loss of each document counts, as for an attacker with several shadow models. Needed, but in a file for
    ``dualtok run``."""

    model: str | None = None
    """Folder or hub name of the trained model. None: what this run itself has trained, its latest checkpoint."""

    along: Literal["line", "run"] = "line"
    """Which models are tried: those on the straight line from the reference to the trained model (``line``), or the
    run's own checkpoints (``run``: early stopping with a limit), of which the one with the lowest loss on
    ``non_members`` is taken among those within the limit. ``train.checkpoint_keep`` says how many there are."""

    auc: Annotated[float, Field(gt=0.5, lt=1)] = 0.53
    """Largest AUC that the Ref attack with the surrogate reference is expected to reach. Unit: none."""

    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """How sure that is to hold for other documents of the same kind: few non-members keep the model nearer to the
    reference. Unit: probability."""

    members: SplitName = "train"
    """Split that the model was trained on."""

    non_members: SplitName = "validation"
    """Split that none of the three models has seen."""

    def __post_init__(self) -> None:
        """Refuse a class compared with itself, and checkpoints of a model that is no run."""
        if self.along == "run" and self.model is not None:
            raise ValueError(
                "interpolate.model: has no effect with interpolate.along=run, which tries this run's own checkpoints; "
                "remove it"
            )
        if self.members == self.non_members:
            raise ValueError(
                f"interpolate.members: {self.members!r} is also interpolate.non_members; choose two splits"
            )
