"""The audit's joint pass: what a model and the attacker's reference say of the same token, whole distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dualtok.audit.signals.files import read_ragged
from dualtok.audit.signals.from_logits import kl_from_reference
from dualtok.distributed.forward_only import build_forward_only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from dualtok.audit.settings import AuditConfig
    from dualtok.distributed.ranks import Ranks

    Batch = dict[str, torch.Tensor]

KL = "kl_from_reference"
KL_DTYPES: dict[str, type[np.generic]] = {KL: np.float32}


def joint_forward(folder: Path, reference: Path, settings: AuditConfig, ranks: Ranks) -> Callable[[Batch], Batch]:
    """Return a function from a batch to :func:`~dualtok.audit.signals.from_logits.kl_from_reference` of its tokens.

    Both models are held at once. They take a batch block by block, so that of each no more logits are held than of one.
    """
    held: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, labels: torch.Tensor) -> Batch:
        held[:] = [logits]
        return {"labels": labels}

    def compare(logits: torch.Tensor, labels: torch.Tensor) -> Batch:
        return kl_from_reference(logits, held.pop(), labels)

    passes = [
        build_forward_only(
            model,
            precision=settings.precision,
            batch_size=1,
            deepspeed_json=settings.deepspeed,
            ranks=ranks,
            signals=signals,
            trust_remote_code=settings.trust_remote_code,
        )
        for model, signals in ((reference, keep), (folder, compare))
    ]

    def forward(batch: Batch) -> Batch:
        rows = []
        for row in range(len(batch["labels"])):
            block = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            passes[0](block)
            rows.append(passes[1](block)[KL])
        return {KL: torch.cat(rows)}

    return forward


def read_divergences(path: Path) -> dict[int, NDArray[np.float32]]:
    """Return each document's KL of its predicted tokens.

    Raises:
        DataError: the file is missing, torn or of another format.
    """
    return {
        int(document): group.values[KL][start:end].astype(np.float32)
        for group in read_ragged(path, KL_DTYPES)
        for document, start, end in zip(group.document, group.offsets, group.offsets[1:], strict=False)
    }
