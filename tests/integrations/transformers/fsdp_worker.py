"""Give a model's token losses and their gradients under torch's FSDP: ``torchrun ... -m ... FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_from_disk
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dualtok.integrations.transformers import DualCollator, with_token_losses
from dualtok.integrations.transformers.loss_function import gather_of, ranks_of_job
from dualtok.integrations.transformers.token_losses import aligned_with_predictions
from dualtok.objective.loss import build_objective


def main() -> None:
    """Write loss and gradients of both versions of FSDP."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    ranks = ranks_of_job(torch.device("cpu"))
    rows = list(load_from_disk(str(folder / "data")))[:8]
    batch = DualCollator()(rows[4 * ranks.rank : 4 * ranks.rank + 4])
    found = {}
    for version in (1, 2):
        model = with_token_losses(AutoModelForCausalLM.from_pretrained(folder / "start"))
        if version == 1:
            wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            wrapped = fully_shard(model)
        features = {name: batch[name] for name in ("input_ids", "attention_mask", "shift_labels")}
        losses = wrapped(**features)["token_losses"]
        reference = aligned_with_predictions(batch["reference_loss"], 0.0)
        parts = {"labels": batch["shift_labels"], "reference_loss": reference}
        outcome = build_objective("dual")(losses, parts, gather=gather_of(ranks))
        outcome.loss.backward()
        if version == 1:
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        else:
            named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            gradients = {
                name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in named.items()
            }
        loss = float(ranks.sum(outcome.loss)) / ranks.world_size
        found[version] = (loss, {name.replace("_fsdp_wrapped_module.", ""): g for name, g in gradients.items()})
    if ranks.is_first:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
