"""Settings of the objectives. Reading a run needs them, so that they do without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

Normalize = Literal["per_set", "per_share"]
Scope = Literal["micro_batch", "local", "step"]
Unlearn = Literal["ascent", "confidence"]
ObjectiveName = Literal["dual", "selective", "goldfish", "causal_lm"]
NEEDS_REFERENCE: tuple[ObjectiveName, ...] = ("dual", "selective")
"""Objectives whose batches must have ``reference_loss``; the others only report s(t) when it is there."""

LOSS_MEMORY_MIB, ACCELERATOR_LOSS_MEMORY_MIB = 256, 1024
"""Memory for logits unless a setting says otherwise, on a CPU and on an accelerator, which small chunks keep waiting:
on an H200 a vocabulary of 256,000 took 235 ms with 256 MiB and 126 ms with 1 GiB."""

ROUNDING = 1e-9
"""Added before the floor of share * n: in floating point 0.29 * 100 is 28.999999999999996, and 29 tokens are meant."""


@dataclass(frozen=True)
class SelectionConfig:
    """Shares, threshold and weight of the dual loss."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    hard_share: float = 0.6
    """K_h, share of all predicted tokens that are learned: those with the highest s(t). Default: paper."""

    memorized_share: float = 0.2
    """K_m, largest share of all predicted tokens that are unlearned: those with the lowest s(t). Default: paper."""

    tau: float = 0.0
    """Only tokens with s(t) strictly below this, in nats, are unlearned. Default: paper. Unit: nats."""

    alpha: float = 0.8
    """Weight of the unlearning term. Default: paper, which reports divergence at 1.5-2. Unit: none."""

    normalize: Normalize = "per_set"
    """What the sum over T_m is divided by: its size (``per_set``), or memorized_share * n (``per_share``), so that a
    nearly empty T_m cannot give a few tokens a huge weight. The paper does not say; ``per_set`` is dualtok's reading of
    it."""

    unlearn: Unlearn = "ascent"
    """How T_m is unlearned: its mean CE is raised (``ascent``, paper), without a bound; or its mean probability is
    lowered (``confidence``): the gradient of each token is that of its CE times the probability that the model gives
    it, and so ends by itself as the token is unlearned. The idea of an ascent in proportion to the model's confidence
    is from CATNIP (Yang et al. 2026, arXiv 2602.02824); this is its simplest form, not that paper's loss."""

    scope: Scope = "micro_batch"
    """Tokens that are ranked together: one micro-batch over all data-parallel ranks (``micro_batch``); this rank's part
    of it alone (``local``: no communication, but results depend on the number of ranks); or all micro-batches of an
    optimizer step (``step``: results do not depend on gradient accumulation, but with it every step runs one more
    forward pass, without gradients). The paper has one GPU, hence one micro-batch."""

    def __post_init__(self) -> None:
        """Refuse shares, thresholds and weights that mean nothing."""
        check_shares(self.hard_share, self.memorized_share)
        check_alpha(self.alpha)
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("unlearn", self.unlearn, get_args(Unlearn))
        if not math.isfinite(self.tau):
            raise ValueError(f"selection.tau: must be finite, got {self.tau}")


@dataclass(frozen=True)
class GoldfishConfig:
    """Which tokens the Goldfish objective never learns."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    drop_every: int = 4
    """One token in so many is left out, on average. Default: Hans et al. 2024 (k = 4). Unit: tokens."""

    context: int = 13
    """Number of preceding tokens whose hash decides. Default: Hans et al. 2024 (h = 13). Unit: tokens."""

    def __post_init__(self) -> None:
        """Refuse values that would drop everything or hash nothing."""
        if self.drop_every < 2:
            raise ValueError(f"goldfish.drop_every: must be at least 2, got {self.drop_every}")
        if self.context < 1:
            raise ValueError(f"goldfish.context: must be at least 1, got {self.context}")


def check_shares(hard_share: float, memorized_share: float) -> None:
    """Raise ValueError for shares outside [0, 1] or summing above 1."""
    for name, share in (("hard_share", hard_share), ("memorized_share", memorized_share)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"selection.{name}: must lie between 0 and 1, got {share}")
    if hard_share + memorized_share > 1.0 + ROUNDING:
        raise ValueError(
            f"selection.hard_share + selection.memorized_share: {hard_share} + {memorized_share} is above 1; "
            "a token cannot be learned and unlearned at once"
        )


def check_alpha(alpha: float) -> None:
    """Raise ValueError for a weight of the unlearning term that is negative or not finite."""
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"selection.alpha: must be finite and not negative, got {alpha}")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"selection.{name}: must be one of {', '.join(map(repr, known))}, got {value!r}")
