"""Settings of the audit."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

AttackName = Literal["loss", "ref", "zlib", "min_k", "min_k_plus_plus"]


@dataclass(config=ConfigDict(extra="forbid"))
class AuditConfig:
    """Which attacks are run on which documents, and how their figures are stated."""

    attacks: tuple[AttackName, ...] = ("loss", "ref", "zlib", "min_k", "min_k_plus_plus")
    """Attacks to run, in the order of the report's columns. ``ref`` needs the attacker's reference model."""

    bootstrap_resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples of the documents behind every interval. Below about 1000 the ends of a 95 % interval move
    visibly with the seed."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of every interval."""

    fpr_targets: list[Annotated[float, Field(gt=0, lt=1)]] = dataclasses.field(
        default_factory=lambda: [0.1, 0.01, 0.001]
    )
    """False-positive rates at which the true-positive rate is given; a rate below one non-member is printed as n/a."""

    min_k_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a document's least likely tokens that Min-K% and Min-K%++ average; Shi et al. 2024 found 0.2 best."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the bootstrap and of the choice of documents."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Blocks per forward pass and rank."""

    max_documents: Annotated[int, Field(ge=2)] | None = None
    """At most this many members and this many non-members, drawn at random with ``seed``; null takes all."""

    def __post_init__(self) -> None:
        """Refuse empty and repeated lists."""
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise ValueError("audit.attacks: name at least one attack, and each only once")
        if not self.fpr_targets or len(set(self.fpr_targets)) < len(self.fpr_targets):
            raise ValueError("audit.fpr_targets: give at least one rate, and each only once")
