"""One decision of all ranks about a step that goes wrong: a loss that is not finite, or far above those before it.

A step can only be left out before its optimizer runs, so the model itself looks at the step's mean token loss when the
last micro-batch comes: above the limit its loss becomes NaN, and with it every gradient; DeepSpeed then changes
nothing. What else follows is decided afterwards, from figures that every rank has.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dualtok.config.train import GuardAction, GuardConfig
    from dualtok.distributed.ranks import Ranks
    from dualtok.objective.token_weights import WeightedLoss


class LossLimit:
    """Adds up the plain loss of a step's micro-batches and says at the last one whether the step shall count.

    Args:
        ranks: the data-parallel ranks; all of them decide alike.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._limit, self._left = math.inf, 0
        self._sums = torch.zeros(2)

    def begin(self, limit: float, micro_batches: int) -> None:
        """Start a step: ``limit`` on its mean token loss in nats, infinite for none."""
        self._limit, self._left = limit, micro_batches
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)

    def factor(self, outcome: WeightedLoss) -> float:
        """Return what to multiply a micro-batch's loss by: NaN if the step shall not count, else 1."""
        if math.isinf(self._limit):
            return 1.0
        self._sums += outcome.weights.totals[-1]
        self._left -= 1
        if self._left:
            return 1.0
        total, count = self._ranks.sum(self._sums).tolist()
        return math.nan if count and total / count > self._limit else 1.0


STATE = ("losses", "strikes", "roll_backs", "alpha_scale")
"""What a guard remembers, in checkpoints too."""


@dataclass
class Guard:
    """Decides what follows a bad step; the same on every rank, and after a resume."""

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    """Mean token losses of the last good steps."""
    strikes: int = 0
    """Bad steps since the last good one."""
    roll_backs: int = 0
    """Times the run went back to a checkpoint."""
    alpha_scale: float = 1.0
    """What alpha has been lowered to, as a share of the run's."""

    def limit(self) -> float:
        """Return the mean token loss above which a step is a spike; infinite while there is nothing to compare with."""
        if self.config.spike_factor is None or len(self.losses) < self.config.window:
            return math.inf
        return self.config.spike_factor * statistics.median(self.losses)

    def good(self, plain_loss: float) -> None:
        """Take note of a step that counted."""
        self.strikes = 0
        if self.config.spike_factor is not None:
            self.losses = [*self.losses, plain_loss][-self.config.window :]

    def bad(self, *, spike: bool) -> GuardAction:
        """Return what to do about a bad step: as configured, or ``stop`` after too many."""
        self.strikes += 1
        action = self.config.on_spike if spike else self.config.on_nan
        self.roll_backs += action == "roll_back"
        if max(self.strikes, self.roll_backs) > self.config.patience:
            return "stop"
        if action == "lower_alpha":
            self.alpha_scale *= self.config.alpha_factor
        return action

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        for name in STATE:
            setattr(self, name, state[name])
