"""Which decoder layers each pipeline stage holds. Planning a run needs it, so that it does without torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class StageBounds:
    """The decoder layers of one stage: ``first`` <= layer < ``stop``."""

    stage: int
    stages: int
    first: int
    stop: int

    @property
    def is_first(self) -> bool:
        """Whether the stage holds the embeddings."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage holds the final norm and the head."""
        return self.stage == self.stages - 1


def cut(costs: Sequence[int], head: int, stages: int, balance: str | Sequence[int]) -> list[StageBounds]:
    """Deal decoder layers to stages.

    Args:
        costs: cost of each layer.
        head: cost of the head, borne by the last stage.
        stages: number of stages.
        balance: ``cost`` makes the dearest stage as cheap as possible, ``layers`` deals equal numbers (earlier stages
            take the surplus), a sequence is taken as it is.

    Raises:
        ConfigError: there are more stages than layers, or the sequence does not add up.
    """
    n = len(costs)
    if stages > n:
        raise ConfigError(
            f"train.pipeline.stages: {stages} stages for a model of {n} decoder layers; a stage holds at least one"
        )
    if isinstance(balance, str):
        sizes = _equal_sizes(n, stages) if balance == "layers" else _cheapest_sizes(costs, head, stages)
    else:
        sizes = list(balance)
        if sum(sizes) != n:
            raise ConfigError(f"train.pipeline.balance: {sizes} sums to {sum(sizes)}, but the model has {n} layers")
    stops = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return [StageBounds(stage, stages, stops[stage] - sizes[stage], stops[stage]) for stage in range(stages)]


def _equal_sizes(n: int, stages: int) -> list[int]:
    return [n // stages + (stage < n % stages) for stage in range(stages)]


def _cheapest_sizes(costs: Sequence[int], head: int, stages: int) -> list[int]:
    """Minimise the cost of the dearest stage; among equals the earlier stages are the smaller ones."""
    running = [0]
    for cost in costs:
        running.append(running[-1] + cost)
    n = len(costs)
    # best[k][i]: cost of the dearest of k stages that hold the first i layers, and where the last of them starts
    best = [{i: (running[i], 0) for i in range(1, n + 1)}]
    for _ in range(1, stages):
        earlier = best[-1]
        best.append(
            {
                i: min((max(earlier[j][0], running[i] - running[j]), j) for j in earlier if j < i)
                for i in range(len(best) + 1, n + 1)
            }
        )
    # The head weighs on the last stage alone, so its start is chosen with the head's cost included.
    start = min((max(best[-2][j][0], running[n] - running[j] + head), j) for j in best[-2] if j < n)[1]
    starts = [n, start]
    for k in range(stages - 2, 0, -1):
        starts.append(best[k][starts[-1]][1])
    starts = [*starts, 0][::-1]
    return [stop - first for first, stop in pairwise(starts)]
