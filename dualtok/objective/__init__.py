"""The science: pure tensor functions. Depends on torch alone.

Names are loaded when they are first used: settings are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualtok.objective.calibrate import calibrated_loss
    from dualtok.objective.chunked_cross_entropy import LogitScaling, linear_cross_entropy
    from dualtok.objective.goldfish import goldfish_mask
    from dualtok.objective.head import LossHead, token_losses
    from dualtok.objective.loss import (
        CausalLM,
        Dual,
        Goldfish,
        Objective,
        Selective,
        build_objective,
        causal_lm_loss,
        dual_loss,
        goldfish_loss,
        selective_loss,
    )
    from dualtok.objective.selection import RankGather, Selection, SelectionCounts, select_tokens
    from dualtok.objective.settings import GoldfishConfig, SelectionConfig
    from dualtok.objective.token_weights import TokenWeights, WeightedLoss, apply_weights

_MODULES = {
    "calibrate": ("calibrated_loss",),
    "goldfish": ("goldfish_mask",),
    "head": ("LossHead", "token_losses"),
    "chunked_cross_entropy": ("LogitScaling", "linear_cross_entropy"),
    "loss": (
        "CausalLM",
        "Dual",
        "Goldfish",
        "Objective",
        "Selective",
        "build_objective",
        "causal_lm_loss",
        "dual_loss",
        "goldfish_loss",
        "selective_loss",
    ),
    "selection": ("RankGather", "Selection", "SelectionCounts", "select_tokens"),
    "settings": ("GoldfishConfig", "SelectionConfig"),
    "token_weights": ("TokenWeights", "WeightedLoss", "apply_weights"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 - a list of the names above


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"dualtok.objective.{_MODULE_OF[name]}"), name)
