"""The science: pure tensor functions. Depends on torch alone."""

from dualtok.objective.calibrate import calibrated_loss
from dualtok.objective.head import token_losses
from dualtok.objective.loss import (
    DualLoss,
    GoldfishConfig,
    Objective,
    build_objective,
    causal_lm_loss,
    dual_loss,
    goldfish_mask,
    selective_loss,
)
from dualtok.objective.selection import Selection, SelectionConfig, SelectionCounts, select_tokens

__all__ = [
    "DualLoss",
    "GoldfishConfig",
    "Objective",
    "Selection",
    "SelectionConfig",
    "SelectionCounts",
    "build_objective",
    "calibrated_loss",
    "causal_lm_loss",
    "dual_loss",
    "goldfish_mask",
    "select_tokens",
    "selective_loss",
    "token_losses",
]
