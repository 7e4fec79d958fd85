"""Started under torchrun by test_memory.py: the bytes of model states that real DeepSpeed engines hold, as JSON.

Every tensor that lives after a forward and backward pass, when optimizer states and gradients all exist, and that did
not before the engine was built, counts once per storage. Of one optimizer step, the bytes of each kind of collective
are counted, those below a kilobyte (norms, flags) left out.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from dualtok.config.model import ModelConfig
from dualtok.config.train import TrainConfig
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import join_ranks, leave_ranks
from dualtok.model.fresh import write_fresh_weights
from dualtok.objective.loss import build_objective
from dualtok.train.engines.build import build_engine

if TYPE_CHECKING:
    from dualtok.distributed.ranks import Ranks

ROWS, LENGTH = 1, 8
LOOKS = 5


def storages() -> dict[int, int]:
    """Return address -> bytes of every tensor alive, gradients included."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu" and tensor.untyped_storage().size():
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().size()
    return found


SENT: Counter[str] = Counter()
WHOLE = {"all_gather_into_tensor": 0, "all_gather": 1, "reduce_scatter_tensor": 1, "all_reduce": 0, "reduce": 0}
"""Collectives, and which argument has the whole data: what is gathered, or what is to be reduced."""


def count_collectives() -> None:
    """Wrap torch's collectives, before DeepSpeed looks them up."""
    for name in WHOLE:
        setattr(dist, name, counting(name, getattr(dist, name)))


def counting(name: str, call: Any) -> Any:
    """Return a collective that adds its bytes to SENT."""

    def counted(*args: Any, **named: Any) -> Any:
        tensors = [*args, *(value for value in named.values() if isinstance(value, torch.Tensor))]
        tensor = tensors[WHOLE[name]]
        size = tensor.numel() * tensor.element_size() * (dist.get_world_size() if name == "all_gather" else 1)
        SENT[name] += size if size > 1000 else 0
        return call(*args, **named)

    return counted


def held(ranks: Ranks, before: dict[int, int]) -> int:
    """Return the bytes of storages that were not there before.

    A collective's thread lets go of what it sent a moment after it is waited for: the least of some looks counts.
    """
    ranks.barrier()
    looks = []
    for _ in range(LOOKS):
        looks.append(sum(size for address, size in storages().items() if address not in before))
        time.sleep(0.1)
    return min(looks)


def main(cases: list[dict[str, Any]], shape: dict[str, Any], folder: Path) -> None:
    """Measure each case and write rank 0's figures."""
    count_collectives()
    ranks = join_ranks()
    config = AutoConfig.for_model(**shape)
    if ranks.is_first:
        write_fresh_weights(config, 0, folder / "weights")
    ranks.barrier()
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    batch = {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(ROWS, 1), "labels": ids}
    results = []
    for case in cases:
        file = folder / f"deepspeed-{ranks.rank}.json"
        file.write_text(json.dumps({"zero_optimization": case["zero"]}))
        train = TrainConfig(
            learning_rate=1e-3,
            batch_size=2 * ranks.world_size,
            steps=5,
            gradient_accumulation=2,
            precision=case["precision"],
            deepspeed=str(file),
        )
        before = storages()
        engine: Any = build_engine(
            folder / "weights",
            ModelConfig(path=str(folder / "weights")),
            train,
            config=training_config(train, ranks.world_size),
            objective=build_objective("causal_lm"),
            total_steps=5,
            layout=build_layout(ranks),
        )
        engine.train_step([batch, batch])
        SENT.clear()
        engine.train_step([batch, batch])
        sent = dict(SENT)
        engine.engine.backward(engine.engine(batch))
        engine.model.outcome = None
        results.append({"held": held(ranks, before), "sent": sent})
        engine.engine.destroy()
        del engine
    if ranks.is_first:
        (folder / "measured.json").write_text(json.dumps(results))
    leave_ranks()


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    main(given["cases"], given["shape"], Path(sys.argv[1]).parent)
