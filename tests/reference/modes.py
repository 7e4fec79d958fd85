"""Run under torchrun: the reference losses of every live mode on the job's ranks, compared with transformers' own.

    torchrun ... -m tests.reference.modes FOLDER

FOLDER holds ``job.json`` (``data``, ``base``, ``adapter``, ``merged``: folders) and gets ``result-<ranks>.json``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualtok.config.model import LoraConfig, ModelConfig
from dualtok.config.reference import ReferenceConfig
from dualtok.config.train import TrainConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.distributed.deepspeed_config import training_config
from dualtok.distributed.forward_only import build_forward_only
from dualtok.distributed.layout import Layout, build_layout
from dualtok.distributed.ranks import join_ranks
from dualtok.model.adapters import prepare_adapters
from dualtok.model.load import DTYPES, read_model_config
from dualtok.objective.loss import build_objective
from dualtok.reference.live import AdapterReference
from dualtok.train.engines.build import build_engine
from dualtok.train.live_reference import build_reference, check_reference
from tests.support import partitioned_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dualtok.data.packing import Batch
    from dualtok.reference.live import LiveReference

MICRO_BATCH, WINDOW, BATCHES = 6, 2, 4
"""Blocks over all replicas, micro-batches per optimizer step, micro-batches compared."""


class Comparison:
    """Reference losses found in a mode against those expected, over all ranks."""

    def __init__(self, job: dict[str, str], layout: Layout) -> None:
        self.job, self.layout = job, layout
        self.stream = DataFolder(job["data"]).open("train", seed=5)
        self.result: dict[str, Any] = {}

    def batches(self) -> Iterator[Batch]:
        replicas = self.layout.data_parallel
        return iter(self.stream.batches(0, MICRO_BATCH, replicas.rank, replicas.world_size))

    @torch.no_grad()
    def transformers_losses(self, folder: str, precision: str) -> list[torch.Tensor]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
        return [
            torch.nn.functional.cross_entropy(
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
                .logits.float()
                .transpose(1, 2),
                batch["labels"],
                reduction="none",
            )
            for batch in islice(self.batches(), BATCHES)
        ]

    def compare(self, name: str, reference: LiveReference, expected: dict[str, list[torch.Tensor]]) -> None:
        """Score batches as training does, and one as evaluation does in the middle of them."""
        found: list[torch.Tensor] = []
        for number, batch in enumerate(islice(reference.scored(self.batches(), WINDOW), BATCHES)):
            found.append(batch["reference_loss"])
            if number == 0:
                again = reference.token_losses(next(self.batches()))
                found_again = float((again - batch["reference_loss"]).abs()[batch["labels"] >= 0].max())
        reference.close()
        entry: dict[str, Any] = {"interleaved": max(self.layout.ranks.gather_objects(found_again))}
        for other, losses in expected.items():
            difference = (torch.stack(found) - torch.stack(losses)).abs()
            entry[other] = {
                "max": max(self.layout.ranks.gather_objects(float(difference.max()))),
                "mean": max(self.layout.ranks.gather_objects(float(difference.mean()))),
            }
        self.result[name] = entry


def own_models(comparison: Comparison, precision: str) -> None:
    """Compare the modes whose reference has a model of its own."""
    job, layout = comparison.job, comparison.layout
    manifest = load_manifest(job["data"])
    expected = {"transformers": comparison.transformers_losses(job["merged"], precision)}
    whole = build_forward_only(
        job["merged"], precision=precision, batch_size=8, deepspeed_json=None, ranks=layout.ranks
    )  # the pass that `dualtok score` makes
    expected["stored"] = [whole(batch) for batch in islice(comparison.batches(), BATCHES)]
    own = Path(job["folder"]) / str(os.getpid())
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu"}}
    (own / "offload.json").write_text(json.dumps({"zero_optimization": zero}))
    modes: dict[str, dict[str, Any]] = {
        "offload": {"mode": "offload"},
        "offload partitioned": {"mode": "offload", "deepspeed": str(own / "offload.json")},
        "cpu": {"mode": "cpu", "prefetch": 3},
        "resident": {"mode": "resident"},
        "resident partitioned": {"mode": "resident", "deepspeed": partitioned_json(own)},
    }
    for name, settings in modes.items():
        config = ReferenceConfig(model=job["merged"], precision=precision, batch_size=4, **settings)
        folder = check_reference(config, DataFolder(job["data"], manifest))
        before = {id(parameter) for parameter in partitioned_parameters()}
        reference = build_reference(config, folder, layout)
        comparison.compare(f"{name} {precision}", reference, expected)
        if name == "offload partitioned":
            new = [p for p in partitioned_parameters() if id(p) not in before]
            entry = comparison.result[f"{name} {precision}"]
            entry["held"] = sum(p.ds_tensor.numel() for p in new)
            entry["whole"] = sum(p.ds_numel for p in new)
            entry["gathered"] = sum(p.numel() for p in new)
            entry["devices"] = sorted({str(p.ds_tensor.device) for p in new})


def partitioned_parameters() -> list[Any]:
    """Return all parameters that ZeRO-3 has in hand in this process."""
    return [p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter) and hasattr(p, "ds_tensor")]


def adapters(comparison: Comparison, precision: str, stage: int, adapter: str | None, **engine_settings: Any) -> None:
    """Train adapters for a few steps, then compare what the model gives as its own reference."""
    job, layout = comparison.job, comparison.layout
    config = Path(job["folder"]) / str(os.getpid()) / f"zero{stage}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    train = TrainConfig(
        learning_rate=2e-2,
        batch_size=WINDOW * MICRO_BATCH,
        gradient_accumulation=WINDOW,
        steps=3,
        precision=precision,
        deepspeed=str(config),
        schedule="constant",
        **engine_settings,
    )
    model = ModelConfig(path=job["base"], lora=LoraConfig(rank=4, alpha=8, dropout=0.0))
    assert model.lora is not None
    plan = prepare_adapters(model.lora, read_model_config(job["base"]), seed=3, base=job["base"], reference=adapter)
    # Before the engine: while one of ZeRO-3 lives, transformers partitions every model that it loads.
    expected = comparison.transformers_losses(job["merged"] if adapter else job["base"], precision)
    engine = build_engine(
        job["base"],
        model,
        train,
        config=training_config(train, layout.data_parallel.world_size),
        objective=build_objective("dual"),
        total_steps=3,
        layout=layout,
        adapters=plan,
    )
    reference = AdapterReference(engine.token_losses, lambda: plan.as_reference(engine.model))
    batches = reference.scored(comparison.batches(), WINDOW)
    losses = []
    for _ in range(3):
        outcomes = engine.train_step(list(islice(batches, WINDOW)))
        # An inner stage has no outcome, and adds nothing.
        mean = torch.stack([outcome.loss.detach() for outcome in outcomes] or [torch.zeros(())]).mean()
        losses.append(float(layout.ranks.sum(mean)) / layout.data_parallel.world_size)
    name = f"adapter {precision} zero{stage} {'exchanged' if adapter else 'off'}"
    trained = engine.token_losses(next(comparison.batches()))
    comparison.compare(name, reference, {"transformers": expected})
    again = engine.token_losses(next(comparison.batches()))
    trainable = sorted(
        {
            key.rpartition(".")[0].rpartition(".")[2]
            for key, parameter in engine.model.named_parameters()
            if parameter.requires_grad
        }
    )
    comparison.result[name] |= {
        "losses": losses,
        "trained": float((trained - expected[0]).abs().mean()),
        "restored": float((trained - again).abs().max()),
        "trainable": trainable,
        "gradient_norm": engine.gradient_norm(),
    }


def main() -> None:
    """Compare every mode and write the result."""
    job = json.loads((Path(sys.argv[1]) / "job.json").read_text())
    job["folder"] = sys.argv[1]
    (Path(job["folder"]) / str(os.getpid())).mkdir()
    ranks = join_ranks()
    comparison = Comparison(job, build_layout(ranks, 1))
    for precision in ("fp32", "bf16"):
        own_models(comparison, precision)
    for precision, stage, adapter in (
        ("fp32", 0, None),
        ("fp32", 3, None),
        ("fp32", 3, job["adapter"]),
        ("fp32", 2, job["adapter"]),
        ("bf16", 3, None),
        ("bf16", 1, job["adapter"]),
    ):
        adapters(comparison, precision, stage, adapter)
    result = comparison.result
    if ranks.world_size == 2:  # the same two ranks as the stages of one replica, which read the same blocks
        comparison = Comparison(job, build_layout(ranks, 2))
        own_models(comparison, "fp32")
        adapters(comparison, "fp32", 1, None, engine="pipeline", pipeline={"stages": 2})
        adapters(comparison, "fp32", 0, job["adapter"], engine="pipeline", pipeline={"stages": 2})
        result["stages"] = comparison.result
    if ranks.is_first:
        (Path(job["folder"]) / f"result-{ranks.world_size}.json").write_text(json.dumps(result, indent=1))
    ranks.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
