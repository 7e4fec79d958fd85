"""The mean over ranks of losses and gradients is that of one process with the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.objective import RankGather, SelectionConfig, WeightedLoss, apply_weights, build_objective, dual_loss
from tests.objective.support import backward, expected_dual, on_ranks, random_losses, random_mask

if TYPE_CHECKING:
    from dualtok.objective.selection import Gather


def check_parity(
    whole: WeightedLoss, token_loss: torch.Tensor, outcomes: list[WeightedLoss], leaves: list[torch.Tensor]
) -> None:
    """Compare the ranks' outcomes with that of the whole batch, whose rows they hold in order."""
    world_size = len(outcomes)
    mean = torch.stack([outcome.loss.detach() for outcome in outcomes]).double().mean()
    torch.testing.assert_close(mean, whole.loss.detach().double(), rtol=2e-6, atol=2e-6)
    # Each token lives on one rank, so the mean of the gradients is the ranks' own over the world size.
    gradients = [backward(outcome, leaf) for outcome, leaf in zip(outcomes, leaves, strict=True)]
    torch.testing.assert_close(torch.cat(gradients) / world_size, backward(whole, token_loss), rtol=1e-6, atol=1e-9)
    for name in ("hard", "memorized", "calibrated"):
        torch.testing.assert_close(
            torch.cat([getattr(o.weights, name) for o in outcomes]), getattr(whole.weights, name)
        )
    assert all(outcome.weights.counts == whole.weights.counts for outcome in outcomes)
    torch.testing.assert_close(sum(o.weights.totals for o in outcomes), whole.weights.totals)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(["per_set", "per_share"]),
    st.sampled_from([(0.6, 0.2), (0.0, 0.5), (0.3, 0.7), (1.0, 0.0)]),
)
def test_any_split_gives_the_result_of_one_process(
    rows: list[int], seed: int, ties: bool, normalize: Any, shares: tuple[float, float]
) -> None:
    token_loss, reference_loss = random_losses(seed, (sum(rows), 5), ties=ties)
    mask = random_mask(seed, token_loss.shape)
    options: dict[str, Any] = {"normalize": normalize, "hard_share": shares[0], "memorized_share": shares[1]}
    leaves = [part.detach().clone().requires_grad_() for part in token_loss.split(rows)]
    references, masks = reference_loss.split(rows), mask.split(rows)

    def compute(rank: int, gather: Gather) -> WeightedLoss:
        return dual_loss(
            leaves[rank], references[rank], masks[rank], selection=SelectionConfig(**options), gather=gather
        )

    check_parity(
        dual_loss(token_loss, reference_loss, mask, selection=SelectionConfig(**options)),
        token_loss,
        on_ranks(len(rows), compute),
        leaves,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["dual", "selective", "causal_lm", "goldfish"])
def test_every_objective_with_padding_spread_unevenly(name: str, world_size: int) -> None:
    rows, length = 12, 20
    token_loss, reference_loss = random_losses(world_size, (rows, length))
    generator = torch.Generator().manual_seed(world_size)
    batch = {
        "input_ids": torch.randint(0, 9, (rows, length), generator=generator),
        "position_ids": torch.arange(length).repeat(rows, 1),
        # Row i has i labels less than the row above: the first rank has most tokens, the last fewest.
        "labels": torch.where(torch.arange(length) < torch.arange(length, length - rows, -1)[:, None], 1, -100),
        "reference_loss": reference_loss,
    }
    objective = build_objective(name)
    leaves = [part.detach().clone().requires_grad_() for part in token_loss.chunk(world_size)]
    parts = [{k: v.chunk(world_size)[rank] for k, v in batch.items()} for rank in range(world_size)]
    outcomes = on_ranks(world_size, lambda rank, gather: objective(leaves[rank], parts[rank], gather=gather))
    check_parity(objective(token_loss, batch), token_loss, outcomes, leaves)


@pytest.mark.parametrize("name", ["dual", "selective", "causal_lm", "goldfish"])
def test_a_rank_without_tokens_still_has_a_backward_pass(name: str) -> None:
    token_loss, reference_loss = random_losses(3, (2, 20))
    batch = {
        "input_ids": torch.ones(2, 20, dtype=torch.int64),
        "position_ids": torch.arange(20).repeat(2, 1),
        "labels": torch.tensor([[1] * 19 + [-100], [-100] * 20]),
        "reference_loss": reference_loss,
    }
    leaves = [row.detach().clone().requires_grad_() for row in token_loss.split(1)]
    leaves[1] = torch.full((1, 20), float("nan"), requires_grad=True)
    parts = [{k: v[rank : rank + 1] for k, v in batch.items()} for rank in range(2)]
    objective = build_objective(name)
    first, second = on_ranks(2, lambda rank, gather: objective(leaves[rank], parts[rank], gather=gather))
    assert first.loss.item() != 0
    assert second.loss.item() == 0
    assert backward(second, leaves[1]).tolist() == [[0.0] * 20]
    assert first.weights.counts == second.weights.counts


def test_a_rank_without_a_selected_token_still_has_a_backward_pass() -> None:
    leaves = [torch.tensor([9.0, 8.0], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)]
    outcomes = on_ranks(
        2,
        lambda rank, gather: dual_loss(
            leaves[rank], torch.zeros(2), selection=SelectionConfig(hard_share=0.5), gather=gather
        ),
    )
    assert not (outcomes[1].weights.hard | outcomes[1].weights.memorized).any()
    assert backward(outcomes[0], leaves[0]).tolist() == [1.0, 1.0]
    assert backward(outcomes[1], leaves[1]).tolist() == [0.0, 0.0]


def test_no_tokens_on_any_rank() -> None:
    leaves = [torch.full((3,), float("inf"), requires_grad=True) for _ in range(3)]
    mask = torch.zeros(3, dtype=torch.bool)
    outcomes = on_ranks(3, lambda rank, gather: dual_loss(leaves[rank], torch.zeros(3), mask, gather=gather))
    assert [outcome.loss.item() for outcome in outcomes] == [0.0] * 3
    assert not torch.stack([backward(o, leaf) for o, leaf in zip(outcomes, leaves, strict=True)]).any()


def test_scope_local_ranks_each_part_alone() -> None:
    token_loss, reference_loss = random_losses(5, (4, 10))
    objective = build_objective("dual", SelectionConfig(scope="local"))
    parts = [
        {"labels": torch.ones(2, 10, dtype=torch.int64), "reference_loss": part} for part in reference_loss.split(2)
    ]
    losses = token_loss.detach().split(2)
    outcomes = on_ranks(2, lambda rank, gather: objective(losses[rank], parts[rank], gather=gather))
    for outcome, part, reference in zip(outcomes, losses, reference_loss.split(2), strict=True):
        torch.testing.assert_close(outcome.loss, dual_loss(part, reference).loss, rtol=0, atol=0)
        assert outcome.weights.counts.tokens == 20


def step_outcomes(
    objective: Any,
    leaves: list[list[torch.Tensor]],
    references: list[list[torch.Tensor]],
    masks: list[list[torch.Tensor]],
    *,
    informed: bool = False,
) -> list[list[WeightedLoss]]:
    """Return every rank's outcome of every micro-batch of a step; arguments by rank, then micro-batch."""

    def compute(rank: int, gather: Gather) -> list[WeightedLoss]:
        batches = [
            {"labels": torch.where(mask, 1, -100), "reference_loss": reference}
            for mask, reference in zip(masks[rank], references[rank], strict=True)
        ]
        known = RankGather(gather, len(leaves)) if informed else gather
        plans = objective.weigh([leaf.detach() for leaf in leaves[rank]], batches, known)
        return [apply_weights(weights, leaf) for weights, leaf in zip(plans, leaves[rank], strict=True)]

    return on_ranks(len(leaves), compute)


STEPS = st.fixed_dictionaries(
    {
        "hard_share": st.sampled_from([0.0, 0.3, 0.6]),
        "memorized_share": st.sampled_from([0.0, 0.2, 0.4]),
        "normalize": st.sampled_from(["per_set", "per_share"]),
    }
)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.booleans(), st.booleans(), STEPS)
def test_a_step_of_micro_batches_is_one_batch(
    data: st.DataObject, seed: int, ties: bool, informed: bool, options: dict[str, Any]
) -> None:
    """Scope ``step``: A micro-batches on R ranks give what the formulas give for one batch of A * R slices."""
    micro_batches, world_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    slices = micro_batches * world_size  # in global order: micro-batch first, then rank
    rows = data.draw(st.lists(st.integers(0, 4), min_size=slices, max_size=slices))
    token_loss, reference_loss = random_losses(seed, (sum(rows), 5), ties=ties)
    mask = random_mask(seed, token_loss.shape)
    expected = expected_dual(token_loss.detach().numpy(), reference_loss.numpy(), mask.numpy(), **options)

    def by_rank(parts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        return [parts[rank::world_size] for rank in range(world_size)]

    leaves = [part.detach().clone().requires_grad_() for part in token_loss.split(rows)]
    objective = build_objective("dual", SelectionConfig(scope="step", **options))
    assert objective.spans_step
    outcomes = step_outcomes(
        objective,
        by_rank(leaves),
        by_rank(list(reference_loss.split(rows))),
        by_rank(list(mask.split(rows))),
        informed=informed,
    )
    in_order = [outcomes[rank][micro] for micro in range(micro_batches) for rank in range(world_size)]
    # What engines do: each micro-batch's loss over their number, gradients summed, then the mean over ranks.
    total = sum(outcome.loss.double() for outcome in in_order) / slices
    assert isinstance(total, torch.Tensor)
    assert total.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    gradients = [backward(outcome, leaf) / slices for outcome, leaf in zip(in_order, leaves, strict=True)]
    np.testing.assert_allclose(torch.cat(gradients).numpy(), expected.gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(torch.cat([o.weights.hard for o in in_order]).numpy(), expected.hard)
    np.testing.assert_array_equal(torch.cat([o.weights.memorized for o in in_order]).numpy(), expected.memorized)
    counts = (int(mask.sum()), int(expected.hard.sum()), int(expected.memorized.sum()))
    assert all(outcome.weights.counts == counts for outcome in in_order)
    assert sum(o.weights.totals for o in in_order)[:, 1].tolist() == [counts[1], counts[2], counts[0]]


@pytest.mark.parametrize("name", ["dual", "selective", "causal_lm", "goldfish"])
@pytest.mark.parametrize("scope", ["micro_batch", "local"])
def test_other_scopes_plan_each_micro_batch_alone(name: str, scope: Any) -> None:
    token_loss, reference_loss = random_losses(6, (3, 4, 30))
    generator = torch.Generator().manual_seed(6)
    batches = [
        {
            "input_ids": torch.randint(0, 9, (4, 30), generator=generator),
            "labels": torch.ones(4, 30, dtype=torch.int64),
            "position_ids": torch.arange(30).repeat(4, 1),
            "reference_loss": part,
        }
        for part in reference_loss
    ]
    objective = build_objective(name, SelectionConfig(scope=scope))
    assert not objective.spans_step
    for weights, losses, batch in zip(objective.weigh(list(token_loss), batches), token_loss, batches, strict=True):
        assert not weights.factors.requires_grad
        alone = objective(losses, batch)
        torch.testing.assert_close(apply_weights(weights, losses).loss, alone.loss, rtol=0, atol=0)
        torch.testing.assert_close(weights.hard, alone.weights.hard, rtol=0, atol=0)
        torch.testing.assert_close(weights.memorized, alone.weights.memorized, rtol=0, atol=0)


def test_a_plan_needs_no_losses_of_tokens_that_weigh_nothing() -> None:
    token_loss, reference_loss = random_losses(7, (2, 3, 20))
    batches = [{"labels": torch.ones(3, 20, dtype=torch.int64), "reference_loss": part} for part in reference_loss]
    plans = build_objective("dual", SelectionConfig(scope="step")).weigh(list(token_loss), batches)
    for weights, losses in zip(plans, token_loss, strict=True):
        selected = weights.factors != 0
        assert (selected == (weights.hard | weights.memorized)).all()
        assert not selected.all()
        torch.testing.assert_close(apply_weights(weights, losses).loss, apply_weights(weights, losses * selected).loss)


@pytest.mark.parametrize(
    ("name", "scope", "calls"),
    [
        ("dual", "micro_batch", 1),
        ("selective", "micro_batch", 1),
        ("causal_lm", "micro_batch", 1),
        ("dual", "local", 0),
    ],
)
def test_a_gather_that_knows_the_ranks_is_called_once(name: str, scope: Any, calls: int) -> None:
    seen = []

    def collect(values: torch.Tensor) -> tuple[torch.Tensor, int]:
        seen.append(len(values))
        return torch.cat([values, values]), 0

    token_loss, reference_loss = random_losses(8, (3, 20))
    batch = {"labels": torch.ones(3, 20, dtype=torch.int64), "reference_loss": reference_loss}
    objective = build_objective(name, SelectionConfig(scope=scope))
    known = objective(token_loss, batch, gather=RankGather(collect, 2))
    assert len(seen) == calls
    asked = objective(token_loss, batch, gather=collect)
    torch.testing.assert_close(known.loss, asked.loss, rtol=0, atol=0)
