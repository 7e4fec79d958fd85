"""The dual loss in the Trainer of Hugging Face transformers, and in trainers that are made of it, as TRL's.

Importing it loads torch, transformers and datasets, which ``import dualtok`` does not.
"""

from __future__ import annotations

from dualtok.integrations.transformers.collator import DualCollator
from dualtok.integrations.transformers.loss_function import dual_loss
from dualtok.integrations.transformers.privacy import PrivacyCallback
from dualtok.integrations.transformers.scoring import score_dataset
from dualtok.integrations.transformers.settings import DualConfig
from dualtok.integrations.transformers.token_losses import with_token_losses
from dualtok.integrations.transformers.trainer import DualMixin, DualTrainer

__all__ = [
    "DualCollator",
    "DualConfig",
    "DualMixin",
    "DualTrainer",
    "PrivacyCallback",
    "dual_loss",
    "score_dataset",
    "with_token_losses",
]
