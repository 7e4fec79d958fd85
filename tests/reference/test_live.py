"""Live references: every mode gives transformers' own losses, on any number of ranks, in the order of the stream."""

from __future__ import annotations

import json
import subprocess
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.data.folder import DataFolder
from dualtok.reference.live import Share, WindowReference
from tests.support import ROOT, command, environment, save_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dualtok.data.packing import Batch

SPREAD = 0.15
"""Standard deviation of the reference's weights: losses from 0 to 30, not all near that of guessing."""


@pytest.fixture(scope="module")
def job(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base model, a LoRA adapter of it, and the two merged by peft itself; return their folder."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("modes")
    base = save_model(folder / "base", seed=1, initializer_range=SPREAD)
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(2)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    names = {name: str(folder / name) for name in ("base", "adapter", "merged")}
    (folder / "job.json").write_text(json.dumps({"data": small_corpus["dir"], **names}))
    return folder


@pytest.fixture(scope="module")
def results(job: Path) -> dict[int, dict[str, Any]]:
    """Run every mode on one and on two ranks, one launch each."""
    for ranks in (1, 2):
        done = subprocess.run(
            command("tests.reference.modes", job, ranks=ranks),
            env=environment(LOCAL_SIZE=str(ranks)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return {ranks: json.loads((job / f"result-{ranks}.json").read_text()) for ranks in (1, 2)}


OWN_MODELS = ("offload", "offload partitioned", "cpu", "resident", "resident partitioned")
ADAPTERS = (
    "fp32 zero0 off",
    "fp32 zero3 off",
    "fp32 zero3 exchanged",
    "fp32 zero2 exchanged",
    "bf16 zero3 off",
    "bf16 zero1 exchanged",
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_mode_gives_the_stored_losses_and_transformers_own(results: dict[int, Any], ranks: int) -> None:
    for mode in OWN_MODELS:
        single, half = results[ranks][f"{mode} fp32"], results[ranks][f"{mode} bf16"]
        for other in ("stored", "transformers"):
            assert single[other]["max"] <= 1e-5, (mode, other, single)
            assert half[other]["mean"] <= 1e-2, (mode, other, half)
        assert half["transformers"]["max"] < 1.0
        assert single["interleaved"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_model_in_training_is_its_own_reference(results: dict[int, Any], ranks: int) -> None:
    for name in ADAPTERS:
        entry = results[ranks][f"adapter {name}"]
        if name.startswith("fp32"):
            assert entry["transformers"]["max"] <= 1e-5, (name, entry)
        assert entry["transformers"]["mean"] <= 1e-2, (name, entry)
        assert entry["trained"] > 0.02, f"{name}: training changed nothing"
        assert entry["restored"] == 0.0, f"{name}: the trained adapter was not switched on again"
        assert entry["gradient_norm"] > 0
        assert entry["trainable"] == ["trained"], "something else than the trained adapter has gradients"


@pytest.mark.slow
def test_adapters_train_the_same_on_any_number_of_ranks_and_zero_stages(results: dict[int, Any]) -> None:
    losses = [results[ranks][f"adapter fp32 zero{stage} off"]["losses"] for ranks in (1, 2) for stage in (0, 3)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_the_stages_of_a_replica_share_the_work(results: dict[int, Any]) -> None:
    for mode in OWN_MODELS:
        entry = results[2]["stages"][f"{mode} fp32"]
        assert entry["stored"]["max"] <= 1e-5, (mode, entry)
        assert entry["transformers"]["max"] <= 1e-5, (mode, entry)


@pytest.mark.slow
def test_an_offloaded_reference_is_sharded_on_the_host_and_let_go_after_each_pass(results: dict[int, Any]) -> None:
    for ranks, precision in ((1, "fp32"), (2, "fp32"), (2, "bf16")):
        entry = results[ranks][f"offload partitioned {precision}"]
        assert entry["devices"] == ["cpu"]
        assert 0 < entry["whole"] / ranks <= entry["held"] <= 1.01 * entry["whole"] / ranks
        assert entry["gathered"] == 0, "weights stay gathered between forward passes"


@pytest.mark.slow
def test_a_pipeline_in_training_is_its_own_reference(results: dict[int, Any]) -> None:
    alone = results[1]["adapter fp32 zero0 off"]
    for name in ("adapter fp32 zero1 off", "adapter fp32 zero0 exchanged"):
        entry = results[2]["stages"][name]
        assert entry["transformers"]["max"] <= 1e-5, (name, entry)
        assert entry["restored"] == 0.0
    assert results[2]["stages"]["adapter fp32 zero1 off"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def batches(small_corpus: dict[str, Any], count: int, rows: int) -> list[Batch]:
    return list(islice(DataFolder(small_corpus["dir"]).open("train").batches(0, rows), count))


def position_losses(batch: Batch) -> torch.Tensor:
    """Stand for a model: losses that tell rows and positions apart."""
    return batch["input_ids"].float() + batch["position_ids"].float() / 1000


@pytest.mark.parametrize(("size", "rows", "window"), [(1, 3, 2), (2, 3, 1), (2, 3, 3), (3, 4, 2), (4, 1, 1), (4, 1, 2)])
def test_rows_are_shared_evenly_and_come_back_in_order(
    small_corpus: dict[str, Any], size: int, rows: int, window: int
) -> None:
    """Fails when a share drops, repeats or exchanges rows; (4, 1, 1) has more ranks than rows."""
    drawn = batches(small_corpus, window, rows)
    calls: list[int] = []

    def forward(batch: Batch) -> torch.Tensor:
        calls.append(len(batch["input_ids"]))
        return position_losses(batch)

    each = -(-rows * window // size)
    parts = [
        WindowReference(forward, 2, Share(rank, size)).forward(Share(rank, size).take(drawn)) for rank in range(size)
    ]
    assert calls == [each] * size
    share = Share(0, size, lambda mine: [mine, *parts[1:]])
    calls.clear()
    found = list(islice(WindowReference(forward, 2, share).scored(iter(drawn), window), window))
    assert sum(calls) == each
    assert max(calls) <= 2
    for batch, scored in zip(drawn, found, strict=True):
        expected = torch.where(batch["labels"] == -100, 0.0, position_losses(batch))
        assert torch.equal(scored["reference_loss"], expected)
        assert all(torch.equal(scored[name], tensor) for name, tensor in batch.items())


def test_a_window_is_drawn_once_per_step(small_corpus: dict[str, Any]) -> None:
    """A window in the making needs no block of the next one: the stream is read as training consumes it."""
    drawn = 0

    def counted() -> Iterator[Batch]:
        nonlocal drawn
        for batch in batches(small_corpus, 5, 2):
            drawn += 1
            yield batch

    reference = WindowReference(position_losses, 8)
    scored = reference.scored(counted(), 2)
    seen = []
    for _ in scored:
        seen.append(drawn)
    assert seen == [2, 2, 4, 4, 5]
