"""The check of DeepSpeed's gradients, on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dualtok.distributed.ranks import join_ranks
from dualtok.train.engines import gradient_check

if TYPE_CHECKING:
    import torch


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_compares_gradients_of_any_length(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed clips at a norm of 1 unless it is told not to."""
    plain = gradient_check._Small.forward

    def steep(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = plain(model, tokens, labels)
        return 100 * loss, logits

    monkeypatch.setattr(gradient_check._Small, "forward", steep)
    assert gradient_check.gradient_error(join_ranks(), stage) < gradient_check.TOLERANCE
