"""Settings of the frozen reference model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.data.config import SplitName


@dataclass(config=ConfigDict(extra="forbid"))
class ReferenceConfig:
    """Which model gives the reference losses CE(theta_ref; t), and how they are computed."""

    model: str
    """Folder or hub name of the reference model, e.g. one that ``dualtok export`` wrote."""

    mode: Literal["stored"] = "stored"
    """``stored``: scored once by ``dualtok score`` and read back beside the tokens, at no cost in the training step."""

    splits: tuple[SplitName, ...] = ("train", "validation")
    """Splits to score. Training needs its own split; ``validation`` serves the Ref AUC that is monitored."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass. The losses themselves are stored as float32: float16 has a spacing of .004 at a
    loss of 4-8, so that borderline tokens would change sides."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Blocks per forward pass and rank."""

    deepspeed: str | None = None
    """DeepSpeed JSON file of a ZeRO-3 forward-only engine, for a reference too large for one device. Without it each
    rank holds the whole model."""
