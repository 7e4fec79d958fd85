"""The science: pure tensor functions. Depends on torch alone."""

from dualtok.objective.calibrate import calibrated_loss
from dualtok.objective.goldfish import GoldfishConfig, goldfish_mask
from dualtok.objective.head import token_losses, torch_cross_entropy
from dualtok.objective.loss import (
    OBJECTIVES,
    CausalLM,
    Dual,
    DualLoss,
    Goldfish,
    Objective,
    Selective,
    build_objective,
    causal_lm_loss,
    dual_loss,
    goldfish_loss,
    selective_loss,
)
from dualtok.objective.selection import Selection, SelectionConfig, SelectionCounts, select_tokens

__all__ = [
    "OBJECTIVES",
    "CausalLM",
    "Dual",
    "DualLoss",
    "Goldfish",
    "GoldfishConfig",
    "Objective",
    "Selection",
    "SelectionConfig",
    "SelectionCounts",
    "Selective",
    "build_objective",
    "calibrated_loss",
    "causal_lm_loss",
    "dual_loss",
    "goldfish_loss",
    "goldfish_mask",
    "select_tokens",
    "selective_loss",
    "token_losses",
    "torch_cross_entropy",
]
