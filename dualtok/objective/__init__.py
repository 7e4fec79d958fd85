"""The science: pure tensor functions. Depends on torch alone."""

from dualtok.objective.calibrate import calibrated_loss
from dualtok.objective.goldfish import GoldfishConfig, goldfish_mask
from dualtok.objective.head import LossHead, token_losses
from dualtok.objective.linear_cross_entropy import LogitScaling, linear_cross_entropy
from dualtok.objective.loss import (
    OBJECTIVES,
    CausalLM,
    Dual,
    DualLoss,
    Goldfish,
    Objective,
    Selective,
    TokenPlan,
    apply_plan,
    build_objective,
    causal_lm_loss,
    dual_loss,
    goldfish_loss,
    selective_loss,
)
from dualtok.objective.selection import RankGather, Selection, SelectionConfig, SelectionCounts, select_tokens

__all__ = [
    "OBJECTIVES",
    "CausalLM",
    "Dual",
    "DualLoss",
    "Goldfish",
    "GoldfishConfig",
    "LogitScaling",
    "LossHead",
    "Objective",
    "RankGather",
    "Selection",
    "SelectionConfig",
    "SelectionCounts",
    "Selective",
    "TokenPlan",
    "apply_plan",
    "build_objective",
    "calibrated_loss",
    "causal_lm_loss",
    "dual_loss",
    "goldfish_loss",
    "goldfish_mask",
    "linear_cross_entropy",
    "select_tokens",
    "selective_loss",
    "token_losses",
]
