"""The planner's bytes: by hand, and against what real engines and real passes hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dualtok.plan.memory import MIB, Bytes, activation_bytes, estimate_memory, model_states, split_evenly
from dualtok.plan.shape import ModelShape, read_shape
from tests.plan.support import CASES, LLAMA, SHAPE, job, job_of

N = 2510


@pytest.mark.parametrize(
    ("zero_stage", "precision", "parameters", "gradients", "optimizer"),
    [
        (0, "fp32", 4 * N, 4 * N, 8 * N),
        (1, "fp32", 4 * N, 4 * N, 6 * N),
        (2, "fp32", 4 * N, 2 * N, 6 * N),
        (3, "fp32", 2 * N, 2 * N, 6 * N),
        (1, "bf16", 2 * N, 6 * N, 6 * N),
        (2, "bf16", 2 * N, 2 * N, 6 * N),
        (3, "bf16", N, 2 * N, 6 * N),
    ],
)
def test_the_model_states_of_two_ranks(
    zero_stage: int, precision: Any, parameters: int, gradients: int, optimizer: int
) -> None:
    held = SHAPE.stage((5,), 0)
    assert sum(held) == SHAPE.parameters == N
    expected = Bytes(parameters), Bytes(gradients), Bytes(optimizer)
    assert model_states(held, job(zero_stage=zero_stage, precision=precision)) == expected


def test_each_parameter_is_padded_to_the_ranks_at_stage_3() -> None:
    parameters, gradients, _ = model_states((1, 1, 5), job(ranks=4))
    assert parameters == Bytes(2 * (1 + 1 + 2))
    assert gradients == Bytes(4 * 4)


def test_offloading_moves_bytes_to_the_host_and_to_disk() -> None:
    held = SHAPE.stage((5,), 0)
    host = model_states(held, job(offload_parameters="cpu", offload_optimizer="cpu"))
    assert host == (Bytes(host=N), Bytes(host=4 * N), Bytes(host=6 * N))
    disk = model_states(held, job(offload_parameters="cpu", offload_optimizer="nvme"))
    assert disk == (Bytes(host=N), Bytes(host=2 * N, disk=2 * N), Bytes(disk=6 * N))
    swap = estimate_memory(SHAPE, job(offload_optimizer="nvme", sub_group=100)).largest.buffers
    assert swap.host == 4 * 4 * (100 + 500)


def test_what_stays_gathered() -> None:
    def gathered(**changes: Any) -> int:
        settings = {"reduce_bucket": 0, "sub_group": 0, "prefetch": 0, "offload_optimizer": "cpu", **changes}
        return estimate_memory(SHAPE, job(**settings)).largest.buffers.device - 2 * 1000

    assert gathered() == 2 * N
    assert gathered(max_reuse=400) == 2 * (200 + 1000)
    assert gathered(max_reuse=0, prefetch=50) == 2 * (50 + 1000)


def test_stages_hold_their_layers_and_both_ends_a_tied_weight() -> None:
    assert split_evenly(5, 2) == (3, 2)
    pipeline = job(ranks=4, stages=2, engine="pipeline", zero_stage=1)
    first, last = estimate_memory(SHAPE, pipeline).stages
    assert first.parameters == Bytes(2 * (1000 + 300))
    assert last.parameters == Bytes(2 * (200 + 1010))
    assert first.optimizer == Bytes(12 * 1300 // 2)
    assert first.head == Bytes()
    unequal = estimate_memory(SHAPE, job(ranks=4, stages=2, engine="pipeline", zero_stage=1, layers_per_stage=(1, 4)))
    assert unequal.stages[0].parameters == Bytes(2 * 1100)
    tied = ModelShape(**{**SHAPE.__dict__, "last": (10,), "tied": 1000})
    assert tied.stage((3, 2), 1) == (70, 30, 70, 30, 10, 1000)
    assert tied.stage((5,), 0) == (1000, *(70, 30) * 5, 10)


def test_a_stage_holds_the_activations_of_the_micro_batches_in_flight() -> None:
    one = activation_bytes(SHAPE, job(), 1)
    assert one == 8 * (24 * 10 + 8 * 40)
    planned = [
        estimate_memory(
            SHAPE,
            job(ranks=4, stages=4, engine="pipeline", zero_stage=1, micro_batches=m, layers_per_stage=(1, 1, 1, 2)),
        ).stages
        for m in (2, 8)
    ]
    mask, inputs = 64, 8 * 2 * 10
    assert [stage.activations.device for stage in planned[1]] == [
        4 * one + mask,
        3 * (one + inputs) + mask,
        2 * (one + inputs) + mask,
        2 * one + inputs + mask,
    ]
    assert planned[0][0].activations.device == 2 * one + mask
    less = activation_bytes(SHAPE, job(activation_checkpointing=True), 5)
    assert less == one + 5 * 8 * 2 * 10


def test_the_reference_by_mode() -> None:
    sizes = {
        mode: estimate_memory(SHAPE, job(reference=mode)).largest.reference
        for mode in ("none", "stored", "adapter", "resident", "cpu", "offload")
    }
    assert sizes["none"] == sizes["stored"] == sizes["adapter"] == Bytes()
    assert sizes["resident"] == Bytes(2 * N)
    assert sizes["cpu"] == Bytes(host=2 * N + 8 * 100 * 4), "weights, and the logits of a micro-batch"
    assert sizes["offload"] == Bytes(2 * 1000, N)


def test_the_head_keeps_within_its_budget_and_small_batches_need_less() -> None:
    hidden = 8 * 10 * 8
    assert estimate_memory(SHAPE, job()).largest.head == Bytes(8 * 100 * 4 + hidden)
    wide = ModelShape(**{**SHAPE.__dict__, "vocabulary": 10**6})
    assert estimate_memory(wide, job(loss_memory_mib=2)).largest.head == Bytes(2 * MIB + hidden)


def test_gathered_parameters_stay_when_asked() -> None:
    settings = {"ranks": 4, "stages": 2, "engine": "sharded_pipeline"}
    sharded = estimate_memory(SHAPE, job(**settings)).stages[0]
    kept = estimate_memory(SHAPE, job(**settings, keep_gathered=True)).stages[0]
    assert kept.parameters.device - sharded.parameters.device == 2 * 1300
    assert sharded.buffers.device - kept.buffers.device == 2 * 1000


def test_hosts_add_up_their_ranks() -> None:
    estimate = estimate_memory(SHAPE, job(ranks=4, stages=2, engine="sharded_pipeline", reference="cpu"))
    totals = [stage.total for stage in estimate.stages]
    assert estimate.per_host(2).device == max(2 * total.device for total in totals)
    assert estimate.per_host(4).host == 4 * (2 * N + 8 * 100 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "pipeline", "stages": 2, "zero_stage": 2}, "zero_stage"),
        ({"stages": 2}, "stages"),
        ({"zero_stage": 0}, "bf16"),
        ({"zero_stage": 2, "offload_optimizer": "cpu"}, "stage 3 alone"),
        ({"keep_gathered": True}, "keep_gathered"),
    ],
)
def test_what_no_engine_offers_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)
    with pytest.raises(ValueError, match="layers_per_stage"):
        estimate_memory(SHAPE, job(ranks=2, stages=2, engine="pipeline", zero_stage=1, layers_per_stage=(2, 2)))


NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 515,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.mark.parametrize("settings", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, NEOX, {"model_type": "gpt2"}])
def test_a_shape_counts_what_the_model_has(settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(**settings)
    shape = read_shape(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(shape.layers) == config.num_hidden_layers
    assert len({sum(layer) for layer in shape.layers}) == 1
    assert shape.tied == (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)
    assert shape.gated == (settings["model_type"] == "llama")


def saved_bytes(config: Any, dtype: torch.dtype, rows: int, length: int) -> int:
    """Return the bytes of distinct storages that a forward pass keeps for its backward pass, weights excepted."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").base_model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).repeat(rows, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.zeros(rows, length, dtype=torch.long), position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().size() for tensor in kept.values())


# GPT-NeoX keeps its fused queries, keys and values and a rotated copy of the first two.
@pytest.mark.parametrize(("settings", "tolerance"), [(LLAMA, 0.05), (NEOX, 0.15)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layers_activations_are_what_autograd_keeps(
    settings: dict[str, Any], tolerance: float, precision: Any
) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    measured = [
        saved_bytes(AutoConfig.for_model(**{**settings, "num_hidden_layers": layers}), dtype, 2, 32)
        for layers in (2, 4)
    ]
    planned = activation_bytes(
        read_shape(AutoConfig.for_model(**settings)), job(rows=2, length=32, precision=precision), 2
    )
    assert planned == pytest.approx(measured[1] - measured[0], rel=tolerance)


@pytest.mark.slow
def test_the_model_states_are_those_of_real_engines_on_two_ranks(measured: list[dict[str, Any]]) -> None:
    held = read_shape(AutoConfig.for_model(**LLAMA)).stage((3,), 0)
    for case, found in zip(CASES, measured, strict=True):
        planned = sum(part.device + part.host for part in model_states(held, job_of(case)))
        assert planned == pytest.approx(found["held"], rel=0.01), case
