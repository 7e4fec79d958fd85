from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtok.objective import (
    Dual,
    GoldfishConfig,
    SelectionConfig,
    WeightedLoss,
    build_objective,
    causal_lm_loss,
    dual_loss,
    goldfish_mask,
    selective_loss,
)
from dualtok.objective.settings import NEEDS_REFERENCE
from tests.objective.support import backward, expected_dual, random_losses, random_mask

NAN, INF = float("nan"), float("inf")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"normalize": "per_share"},
    {"alpha": 0.0},
    {"alpha": 1.7, "tau": -0.5},
    {"hard_share": 0.3, "memorized_share": 0.7, "tau": 0.5, "normalize": "per_share"},
    {"hard_share": 0.0, "memorized_share": 0.4},
    {"hard_share": 1.0, "memorized_share": 0.0},
    {"tau": -100.0},
    {"memorized_share": 1e-178, "normalize": "per_share"},
]


def agree(token_loss: torch.Tensor, reference_loss: torch.Tensor, mask: torch.Tensor, **options: Any) -> WeightedLoss:
    """Compare value, gradient and sets of the dual loss with the oracle's, and return the outcome."""
    outcome = dual_loss(token_loss, reference_loss, mask, selection=SelectionConfig(**options))
    expected = expected_dual(token_loss.detach().numpy(), reference_loss.numpy(), mask.numpy(), **options)
    assert outcome.loss.shape == ()
    assert outcome.loss.dtype == torch.float32
    assert outcome.loss.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(backward(outcome, token_loss).numpy(), expected.gradient, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(outcome.weights.hard.numpy(), expected.hard)
    np.testing.assert_array_equal(outcome.weights.memorized.numpy(), expected.memorized)
    assert outcome.weights.counts == (int(mask.sum()), expected.hard.sum(), expected.memorized.sum())
    return outcome


def test_a_batch_worked_out_by_hand() -> None:
    # s = 2, 1, .5, -1, -2: three are learned, one unlearned, one (the fourth) unused.
    token_loss = torch.tensor([3.0, 2.0, 1.0, 4.0, 0.5], requires_grad=True)
    outcome = dual_loss(token_loss, torch.tensor([1.0, 1.0, 0.5, 5.0, 2.5]))
    assert outcome.loss.item() == pytest.approx((3 + 2 + 1) / 3 - 0.8 * 0.5)
    third = 1 / 3
    torch.testing.assert_close(backward(outcome, token_loss), torch.tensor([third, third, third, 0.0, -0.8]))
    torch.testing.assert_close(outcome.weights.calibrated, torch.tensor([2.0, 1.0, 0.5, -1.0, -2.0]))


def test_what_the_model_knows_better_than_the_reference_is_unlearned() -> None:
    """Fails when the sign of s is reversed, as it once was in a public re-implementation."""
    known, unknown = 0.1, 5.0
    token_loss = torch.tensor([known, unknown], requires_grad=True)
    outcome = dual_loss(
        token_loss, torch.tensor([2.0, 2.0]), selection=SelectionConfig(hard_share=0.5, memorized_share=0.5)
    )
    gradient = backward(outcome, token_loss)
    assert gradient[0] < 0, "descent must raise the loss of the memorized token"
    assert gradient[1] > 0, "descent must lower the loss of the hard token"
    assert outcome.weights.memorized.tolist() == [True, False]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("seed", "shape"), [(0, (4, 16)), (1, (1, 7)), (2, (33,)), (3, (2, 3, 5))])
def test_it_agrees_with_the_formulas(options: dict[str, Any], ties: bool, seed: int, shape: tuple[int, ...]) -> None:
    token_loss, reference_loss = random_losses(seed, shape, ties=ties)
    agree(token_loss, reference_loss, random_mask(seed, shape), **options)
    agree(token_loss, reference_loss, torch.ones(shape, dtype=torch.bool), **options)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.booleans(),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    # tau in half precision: one that float32 rounds to zero is another tau.
    st.fixed_dictionaries(
        {
            "tau": st.floats(-1, 1, width=16),
            "alpha": st.floats(0, 2),
            "normalize": st.sampled_from(["per_set", "per_share"]),
        }
    ),
)
def test_it_agrees_with_the_formulas_for_any_settings(
    seed: int, n: int, ties: bool, cuts: tuple[float, float], options: dict[str, Any]
) -> None:
    token_loss, reference_loss = random_losses(seed, (n,), ties=ties)
    shares = {"hard_share": min(cuts), "memorized_share": max(cuts) - min(cuts)}
    agree(token_loss, reference_loss, random_mask(seed, (n,)), **shares, **options)


def test_no_mask_means_every_token() -> None:
    token_loss, reference_loss = random_losses(4, (3, 8))
    full = dual_loss(token_loss, reference_loss, torch.ones(3, 8, dtype=torch.bool))
    torch.testing.assert_close(dual_loss(token_loss, reference_loss).loss, full.loss, rtol=0, atol=0)


def test_the_memorized_set_may_be_empty() -> None:
    token_loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    for normalize in ("per_set", "per_share"):
        outcome = dual_loss(token_loss, torch.zeros(5), selection=SelectionConfig(normalize=normalize))
        assert outcome.weights.counts == (5, 3, 0)
        assert outcome.loss.item() == pytest.approx(4.0)
        assert torch.isnan(outcome.weights.memorized_loss)


def test_per_share_keeps_a_nearly_empty_memorized_set_harmless() -> None:
    token_loss = torch.tensor([2.0] * 99 + [1.0], requires_grad=True)
    reference_loss = torch.tensor([1.0] * 99 + [3.0])
    per_set = backward(dual_loss(token_loss, reference_loss), token_loss)
    per_share = backward(
        dual_loss(token_loss, reference_loss, selection=SelectionConfig(normalize="per_share")), token_loss
    )
    assert per_set[-1].item() == pytest.approx(-0.8)
    assert per_share[-1].item() == pytest.approx(-0.8 / 20)


@pytest.mark.parametrize("shape", [(2, 3), (0,), (0, 5)])
def test_no_tokens_give_zero_with_a_zero_gradient(shape: tuple[int, ...]) -> None:
    token_loss = torch.full(shape, NAN, requires_grad=True)
    outcome = dual_loss(token_loss, torch.full(shape, INF), torch.zeros(shape, dtype=torch.bool))
    assert outcome.loss.item() == 0.0
    torch.testing.assert_close(backward(outcome, token_loss), torch.zeros(shape), rtol=0, atol=0)
    assert outcome.weights.counts == (0, 0, 0)
    assert outcome.weights.totals.tolist() == [[0, 0]] * 3


def test_one_token_is_learned() -> None:
    token_loss = torch.tensor([[0.5]], requires_grad=True)
    outcome = dual_loss(token_loss, torch.tensor([[3.0]]))
    assert outcome.loss.item() == 0.5
    assert backward(outcome, token_loss).tolist() == [[1.0]]
    assert outcome.weights.counts == (1, 1, 0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_stands_under_the_mask_reaches_neither_value_nor_gradient(bad: float) -> None:
    token_loss, reference_loss = random_losses(5, (4, 9))
    mask = random_mask(5, (4, 9))
    clean = dual_loss(token_loss, reference_loss, mask)
    dirty_loss = token_loss.detach().masked_fill(~mask, bad).requires_grad_()
    dirty = dual_loss(dirty_loss, reference_loss.masked_fill(~mask, bad), mask)
    torch.testing.assert_close(dirty.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(backward(dirty, dirty_loss), backward(clean, token_loss), rtol=0, atol=0)
    torch.testing.assert_close(dirty.weights.calibrated, clean.weights.calibrated, rtol=0, atol=0)
    torch.testing.assert_close(dirty.weights.totals, clean.weights.totals, rtol=0, atol=0)
    assert not dirty.weights.calibrated[~mask].any()


def test_a_broken_reference_leaves_its_token_out() -> None:
    token_loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    outcome = dual_loss(
        token_loss, torch.tensor([2.0, NAN, 1.0]), selection=SelectionConfig(hard_share=0.5, memorized_share=0.5)
    )
    assert outcome.loss.item() == pytest.approx(3.0 - 0.8 * 1.0)
    torch.testing.assert_close(backward(outcome, token_loss), torch.tensor([-0.8, 0.0, 1.0]))
    assert outcome.weights.counts.tokens == 2


def test_a_broken_model_shows_in_the_loss_even_where_nothing_is_selected() -> None:
    token_loss = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    outcome = dual_loss(
        token_loss, torch.tensor([2.0, 1.0, 1.0]), selection=SelectionConfig(hard_share=0.5, memorized_share=0.0)
    )
    assert not outcome.weights.hard[1]
    assert torch.isnan(outcome.loss)
    assert torch.isnan(causal_lm_loss(token_loss).loss)


def test_bfloat16_losses_are_summed_in_float32() -> None:
    # In bfloat16 a sum of 4096 ones stops at 256.
    token_loss = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
    outcome = dual_loss(token_loss, torch.zeros(4096), selection=SelectionConfig(hard_share=1.0, memorized_share=0.0))
    assert outcome.loss.dtype == torch.float32
    assert outcome.loss.item() == pytest.approx(1.0, rel=1e-6)
    assert backward(outcome, token_loss).dtype == torch.bfloat16


def test_a_bfloat16_batch_agrees_with_the_same_values_in_float32() -> None:
    token_loss, reference_loss = random_losses(6, (4, 16))
    low = token_loss.detach().bfloat16().requires_grad_()
    high = low.detach().float().requires_grad_()
    from_low, from_high = dual_loss(low, reference_loss), dual_loss(high, reference_loss)
    torch.testing.assert_close(from_low.loss, from_high.loss, rtol=0, atol=0)
    torch.testing.assert_close(backward(from_low, low), backward(from_high, high).bfloat16(), rtol=0, atol=0)


def test_the_selection_itself_takes_no_gradient() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    token_loss = torch.nn.functional.cross_entropy(logits, torch.arange(6) % 5, reduction="none")
    outcome = dual_loss(token_loss, torch.full((6,), 1.5, requires_grad=True))
    assert outcome.loss.requires_grad
    for part in (
        outcome.weights.calibrated,
        outcome.weights.totals,
        outcome.weights.hard_loss,
        outcome.weights.plain_loss,
    ):
        assert not part.requires_grad
    assert torch.isfinite(backward(outcome, logits)).all()


def test_the_totals_are_sums_and_sizes_of_the_sets() -> None:
    token_loss, reference_loss = random_losses(7, (5, 11))
    mask = random_mask(7, (5, 11))
    outcome = dual_loss(token_loss, reference_loss, mask)
    values = token_loss.detach().numpy().astype(np.float64)
    for row, members in enumerate((outcome.weights.hard, outcome.weights.memorized, mask)):
        chosen = values[members.numpy()]
        np.testing.assert_allclose(outcome.weights.totals[row].numpy(), [chosen.sum(), len(chosen)], rtol=1e-12)
    loss = outcome.weights.hard_loss - 0.8 * outcome.weights.memorized_loss
    assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert outcome.weights.plain_loss.item() == pytest.approx(values[mask.numpy()].mean())


@pytest.mark.parametrize("normalize", ["per_set", "per_share"])
def test_by_confidence_the_gradient_is_that_of_the_mean_probability(normalize: Any) -> None:
    """Against autograd through exp(-CE) of the tokens that the plain dual loss unlearns."""
    token_loss, reference_loss = random_losses(3, (4, 32))
    selection = SelectionConfig(normalize=normalize, alpha=1.3, unlearn="confidence")
    outcome = dual_loss(token_loss, reference_loss, selection=selection)
    ascent = dual_loss(token_loss, reference_loss, selection=replace(selection, unlearn="ascent"))
    assert torch.equal(outcome.weights.memorized, ascent.weights.memorized)
    count = int(outcome.weights.memorized.sum())
    assert count > 0
    gradient = backward(outcome, token_loss)
    again = token_loss.detach().clone().requires_grad_()
    divisor = count if normalize == "per_set" else 0.2 * again.numel()
    probability = (-again[outcome.weights.memorized]).exp().sum() / divisor
    (again[outcome.weights.hard].mean() + 1.3 * probability).backward()
    torch.testing.assert_close(gradient, again.grad)
    assert gradient[outcome.weights.memorized].abs().max() < 1.3 / divisor


@pytest.mark.parametrize(
    "bad", [{"alpha": -1.0}, {"unlearn": "none"}, {"alpha": NAN}, {"normalize": "mean"}, {"hard_share": 0.9}]
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"alpha|normalize|above 1|unlearn"):
        dual_loss(torch.zeros(3), torch.zeros(3), selection=SelectionConfig(**bad))


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(6,\)"):
        dual_loss(torch.zeros(2, 3), torch.zeros(6))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        dual_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        causal_lm_loss(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))


def test_selective_is_the_learning_half_and_unlearns_nothing() -> None:
    token_loss, reference_loss = random_losses(8, (3, 10))
    mask = random_mask(8, (3, 10))
    outcome = selective_loss(token_loss, reference_loss, mask, hard_share=0.4)
    dual = dual_loss(token_loss, reference_loss, mask, selection=SelectionConfig(hard_share=0.4, alpha=0.0))
    torch.testing.assert_close(outcome.loss, dual.loss)
    torch.testing.assert_close(outcome.weights.hard, dual.weights.hard)
    assert dual.weights.memorized.any()
    assert not outcome.weights.memorized.any()


def test_causal_lm_is_the_mean_over_all_predicted_tokens() -> None:
    token_loss, reference_loss = random_losses(9, (3, 10))
    mask = random_mask(9, (3, 10))
    outcome = causal_lm_loss(token_loss.masked_fill(~mask, NAN), mask, reference_loss=reference_loss)
    assert outcome.loss.item() == pytest.approx(token_loss.detach()[mask].double().mean().item(), rel=1e-6)
    torch.testing.assert_close(backward(outcome, token_loss), mask / mask.sum())
    assert outcome.weights.counts == (mask.sum(), mask.sum(), 0)
    torch.testing.assert_close(outcome.weights.hard, mask)
    torch.testing.assert_close(outcome.weights.calibrated, torch.where(mask, token_loss.detach() - reference_loss, 0.0))
    nothing = causal_lm_loss(token_loss, torch.zeros_like(mask))
    assert nothing.loss.item() == 0.0
    assert not backward(nothing, token_loss).any()


def make_batch(seed: int, rows: int = 3, length: int = 40) -> dict[str, torch.Tensor]:
    """A batch as ``data`` yields it: two pieces a row, the last token of each without a label."""
    generator = torch.Generator().manual_seed(seed)
    half = length // 2
    input_ids = torch.randint(0, 50, (rows, length), generator=generator)
    labels = input_ids.roll(-1, dims=1)
    labels[:, half - 1] = labels[:, -1] = -100
    positions = torch.arange(half).repeat(rows, 2)
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "labels": labels,
        "reference_loss": torch.rand(rows, length, generator=generator) * 6,
    }


@pytest.mark.parametrize(
    ("name", "needs"), [("dual", True), ("selective", True), ("causal_lm", False), ("goldfish", False)]
)
def test_every_objective_takes_a_batch_and_ignores_positions_without_a_label(name: str, needs: bool) -> None:
    batch = make_batch(0)
    clean, _ = random_losses(10, (3, 40))
    token_loss = clean.detach().masked_fill(batch["labels"] == -100, NAN).requires_grad_()
    objective = build_objective(name)
    assert (name in NEEDS_REFERENCE) is needs
    if needs:
        with pytest.raises(KeyError, match="reference_loss"):
            objective(token_loss, {key: batch[key] for key in ("input_ids", "position_ids", "labels")})
    outcome = objective(token_loss, batch)
    gradient = backward(outcome, token_loss)
    assert torch.isfinite(outcome.loss)
    assert not gradient[batch["labels"] == -100].any()
    assert outcome.weights.counts.tokens == outcome.weights.totals[2, 1] == 3 * 38
    torch.testing.assert_close(gradient > 0, outcome.weights.hard)
    torch.testing.assert_close(gradient < 0, outcome.weights.memorized)
    assert outcome.weights.memorized.any() == (name == "dual")


def test_objectives_without_need_of_a_reference_report_s_when_there_is_one() -> None:
    batch = make_batch(1)
    token_loss, _ = random_losses(11, (3, 40))
    for name in ("causal_lm", "goldfish"):
        with_reference = build_objective(name)(token_loss, batch)
        without = build_objective(name)(token_loss, {k: v for k, v in batch.items() if k != "reference_loss"})
        torch.testing.assert_close(with_reference.loss, without.loss, rtol=0, atol=0)
        assert with_reference.weights.calibrated.any()
        assert not without.weights.calibrated.any()


def test_the_goldfish_objective_averages_over_what_its_mask_keeps() -> None:
    batch = make_batch(2)
    token_loss, _ = random_losses(12, (3, 40))
    outcome = build_objective("goldfish", goldfish=GoldfishConfig(drop_every=3, context=5))(token_loss, batch)
    kept = goldfish_mask(batch["input_ids"], batch["position_ids"], batch["labels"], drop_every=3, context=5)
    assert 0 < kept.sum() < (batch["labels"] != -100).sum()
    assert outcome.loss.item() == pytest.approx(token_loss.detach()[kept].mean().item(), rel=1e-6)
    torch.testing.assert_close(backward(outcome, token_loss), kept / kept.sum())
    assert outcome.weights.counts == (3 * 38, int(kept.sum()), 0)


def test_settings_reach_the_dual_loss() -> None:
    batch = make_batch(3)
    token_loss, _ = random_losses(13, (3, 40))
    options: dict[str, Any] = {
        "hard_share": 0.3,
        "memorized_share": 0.4,
        "tau": -3.0,
        "alpha": 0.3,
        "normalize": "per_share",
    }
    outcome = build_objective("dual", SelectionConfig(**options))(token_loss, batch)
    unlimited = build_objective("dual", SelectionConfig(**{**options, "tau": 0.0}))(token_loss, batch)
    assert outcome.weights.memorized.sum() < unlimited.weights.memorized.sum(), "tau decides nothing here"
    mask = batch["labels"] != -100
    expected = expected_dual(token_loss.detach().numpy(), batch["reference_loss"].numpy(), mask.numpy(), **options)
    assert outcome.loss.item() == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(backward(outcome, token_loss).numpy(), expected.gradient, rtol=1e-6, atol=1e-8)
    selective = build_objective("selective", SelectionConfig(hard_share=0.3))(token_loss, batch)
    np.testing.assert_array_equal(selective.weights.hard.numpy(), expected.hard)


def test_scope_local_does_not_communicate() -> None:
    def refuse(values: torch.Tensor) -> tuple[torch.Tensor, int]:
        raise AssertionError("scope 'local' gathered scores")

    batch = make_batch(4)
    token_loss, _ = random_losses(14, (3, 40))
    alone = Dual()(token_loss, batch)
    for name in ("dual", "selective"):
        local = build_objective(name, SelectionConfig(scope="local"))(token_loss, batch, gather=refuse)
        torch.testing.assert_close(local.weights.hard, alone.weights.hard)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'plain'.*dual, selective, goldfish, causal_lm"):
        build_objective("plain")
