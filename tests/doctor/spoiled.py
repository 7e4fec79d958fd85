"""``dualtok.doctor.rank_checks`` with something broken: ``python -m tests.doctor.spoiled wrong|hang``."""

from __future__ import annotations

import sys
import time
from typing import Any

import deepspeed
import torch.distributed as dist

from dualtok.doctor import rank_checks


def spoil(what: str) -> None:
    """Break it as releases and machines have been seen to."""
    if what == "wrong":
        # DeepSpeed 0.18.0 to 0.19.5.
        backward = deepspeed.DeepSpeedEngine.backward

        def divided_twice(self: Any, loss: Any, *arguments: Any, **settings: Any) -> Any:
            return backward(self, loss / self.gradient_accumulation_steps(), *arguments, **settings)

        deepspeed.DeepSpeedEngine.backward = divided_twice
        # A link that loses bits of what is large.
        all_reduce = dist.all_reduce

        def wrong(tensor: Any, *arguments: Any, **settings: Any) -> Any:
            work = all_reduce(tensor, *arguments, **settings)
            if tensor.numel() > 100_000:
                tensor[17] += 1
            return work

        dist.all_reduce = wrong
    elif what == "hang":  # one rank never comes, and no link is as fast as is asked
        rank_checks.SLOW["cpu"] = 1e6
        gradients = rank_checks.check_gradients

        def stuck(ranks: Any) -> Any:
            if ranks.rank == 1:
                time.sleep(3600)
            return gradients(ranks)

        rank_checks.check_gradients = stuck


if __name__ == "__main__":
    spoil(sys.argv[1])
    sys.exit(rank_checks.main())
