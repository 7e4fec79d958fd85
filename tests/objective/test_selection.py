from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from dualtok.objective import SelectionConfig, select_tokens
from tests.objective.support import expected_dual, on_ranks, random_mask

FAST = settings(max_examples=100, deadline=None)
NAN, INF = float("nan"), float("inf")


@st.composite
def share_pairs(draw: st.DrawFn) -> tuple[float, float]:
    """Two shares on a grid of 1/20 that sum to at most 1, the ends included."""
    hard = draw(st.integers(0, 20))
    return hard / 20, draw(st.integers(0, 20 - hard)) / 20


def score_arrays(ties: bool = True) -> st.SearchStrategy[Any]:
    """Scores on a grid of 1/4 (many ties), or all different."""
    shapes = hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=12)
    return hnp.arrays(
        np.int64, shapes, elements=st.integers(-12, 12) if ties else st.integers(-(10**6), 10**6), unique=not ties
    ).map(lambda a: a.astype(np.float32) / 4)


def picked(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def test_the_highest_are_learned_and_the_lowest_unlearned() -> None:
    calibrated = torch.tensor([0.5, -2.0, 3.0, 1.0, -1.0, 2.0, -3.0, 0.0, 0.25, 4.0])
    chosen = select_tokens(calibrated)
    assert picked(chosen.hard) == [0, 2, 3, 5, 8, 9]
    assert picked(chosen.memorized) == [1, 6]
    assert chosen.counts == (10, 6, 2)


def test_the_batch_is_ranked_as_a_whole_not_row_by_row() -> None:
    calibrated = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    chosen = select_tokens(calibrated, selection=SelectionConfig(hard_share=0.5, memorized_share=0.5))
    assert chosen.hard.tolist() == [[True] * 3, [False] * 3]
    assert chosen.memorized.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize(
    ("n", "share", "size"),
    [(100, 0.29, 29), (10, 0.6, 6), (5, 0.6, 3), (7, 0.6, 4), (9, 0.6, 5), (3, 0.2, 1), (1, 0.01, 1), (0, 0.6, 0)],
)
def test_the_hard_set_is_the_floor_of_its_share_but_never_empty(n: int, share: float, size: int) -> None:
    chosen = select_tokens(torch.arange(float(n)), selection=SelectionConfig(hard_share=share, memorized_share=0.0))
    assert int(chosen.hard.sum()) == size == chosen.counts.hard


@pytest.mark.parametrize(("n", "share", "size"), [(100, 0.29, 29), (9, 0.2, 1), (4, 0.2, 0), (1, 0.99, 0), (0, 0.5, 0)])
def test_the_memorized_set_is_at_most_the_floor_of_its_share(n: int, share: float, size: int) -> None:
    chosen = select_tokens(
        -1 - torch.arange(float(n)), selection=SelectionConfig(hard_share=0.0, memorized_share=share)
    )
    assert int(chosen.memorized.sum()) == size == chosen.counts.memorized


def test_a_share_of_zero_is_an_empty_set() -> None:
    chosen = select_tokens(
        torch.tensor([-1.0, 1.0, -2.0]), selection=SelectionConfig(hard_share=0.0, memorized_share=0.0)
    )
    assert not chosen.hard.any()
    assert not chosen.memorized.any()
    assert chosen.counts == (3, 0, 0)


def test_a_score_at_tau_is_not_unlearned() -> None:
    calibrated = torch.tensor([-0.5, 0.0, 0.0, -0.25])
    chosen = select_tokens(calibrated, selection=SelectionConfig(hard_share=0.0, memorized_share=1.0, tau=0.0))
    assert picked(chosen.memorized) == [0, 3]
    assert picked(
        select_tokens(calibrated, selection=SelectionConfig(hard_share=0.0, memorized_share=1.0, tau=-0.25)).memorized
    ) == [0]


def test_of_equal_scores_the_lower_position_is_taken_first() -> None:
    chosen = select_tokens(torch.full((10,), -1.0), selection=SelectionConfig(hard_share=0.3, memorized_share=0.4))
    assert picked(chosen.hard) == [0, 1, 2]
    assert picked(chosen.memorized) == [3, 4, 5, 6]


def test_a_lone_token_is_learned_rather_than_unlearned() -> None:
    chosen = select_tokens(torch.tensor([-5.0]), selection=SelectionConfig(hard_share=0.1, memorized_share=0.9))
    assert chosen.hard.tolist() == [True]
    assert chosen.memorized.tolist() == [False]


def test_the_guaranteed_hard_token_makes_room_in_a_memorized_share_of_all() -> None:
    chosen = select_tokens(torch.tensor([-1.0, -2.0]), selection=SelectionConfig(hard_share=1e-9, memorized_share=1.0))
    assert chosen.hard.tolist() == [True, False]
    assert chosen.memorized.tolist() == [False, True]


def test_masked_positions_are_not_ranked_whatever_stands_there() -> None:
    calibrated = torch.tensor([NAN, 1.0, INF, -1.0, -INF, 2.0])
    mask = torch.tensor([False, True, False, True, False, True])
    chosen = select_tokens(calibrated, mask, selection=SelectionConfig(hard_share=0.5, memorized_share=0.5))
    assert picked(chosen.hard) == [5]
    assert picked(chosen.memorized) == [3]
    assert chosen.counts == (3, 1, 1)


def test_a_nan_is_neither_learned_nor_unlearned_nor_counted() -> None:
    calibrated = torch.tensor([NAN, -1.0, NAN, 3.0, NAN])
    chosen = select_tokens(calibrated, selection=SelectionConfig(hard_share=0.5, memorized_share=0.5))
    assert picked(chosen.hard) == [3]
    assert picked(chosen.memorized) == [1]
    assert chosen.counts == (2, 1, 1)


def test_infinities_rank_at_the_ends() -> None:
    calibrated = torch.tensor([0.5, -INF, INF, -0.5, INF, -INF])
    chosen = select_tokens(calibrated, selection=SelectionConfig(hard_share=0.5, memorized_share=1 / 3))
    assert picked(chosen.hard) == [0, 2, 4]
    assert picked(chosen.memorized) == [1, 5]


def test_no_tokens_give_empty_sets() -> None:
    chosen = select_tokens(torch.tensor([[1.0, NAN]]), torch.zeros(1, 2, dtype=torch.bool))
    assert not chosen.hard.any()
    assert not chosen.memorized.any()
    assert chosen.counts == (0, 0, 0)
    assert chosen.hard.shape == (1, 2)


def test_a_scalar_and_a_non_contiguous_view_keep_their_shape() -> None:
    assert select_tokens(torch.tensor(1.0)).hard.item() is True
    calibrated = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]).T
    chosen = select_tokens(calibrated, selection=SelectionConfig(hard_share=0.5, memorized_share=0.5))
    assert chosen.hard.tolist() == [[True] * 3, [False] * 3]
    assert chosen.memorized.tolist() == [[False] * 3, [True] * 3]


def test_the_ranking_is_in_float32_for_low_precision_scores() -> None:
    calibrated = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    chosen = select_tokens(calibrated, selection=SelectionConfig(hard_share=0.5, memorized_share=0.25))
    assert picked(chosen.hard) == [0, 2]
    assert picked(chosen.memorized) == [3]


@FAST
@given(score_arrays(), share_pairs(), st.sampled_from([-1.0, 0.0, 0.25, 2.0]), st.integers(0, 2**16))
def test_it_agrees_with_the_oracle(calibrated: Any, shares: tuple[float, float], tau: float, seed: int) -> None:
    mask = random_mask(seed, calibrated.shape)
    hard_share, memorized_share = shares
    chosen = select_tokens(
        torch.from_numpy(calibrated),
        mask,
        selection=SelectionConfig(hard_share=hard_share, memorized_share=memorized_share, tau=tau),
    )
    expected = expected_dual(
        calibrated,
        np.zeros_like(calibrated),
        mask.numpy(),
        hard_share=hard_share,
        memorized_share=memorized_share,
        tau=tau,
    )
    np.testing.assert_array_equal(chosen.hard.numpy(), expected.hard)
    np.testing.assert_array_equal(chosen.memorized.numpy(), expected.memorized)
    assert chosen.counts == (int(mask.sum()), expected.hard.sum(), expected.memorized.sum())


@FAST
@given(score_arrays(), share_pairs(), st.integers(-8, 8), st.integers(0, 2**16))
def test_the_sets_keep_their_promises(calibrated: Any, shares: tuple[float, float], tau: int, seed: int) -> None:
    mask = random_mask(seed, calibrated.shape)
    hard_share, memorized_share = shares
    values = torch.from_numpy(calibrated)
    hard, memorized, counts = select_tokens(
        values, mask, selection=SelectionConfig(hard_share=hard_share, memorized_share=memorized_share, tau=tau / 4)
    )
    n = int(mask.sum())
    assert not (hard & memorized).any()
    assert not ((hard | memorized) & ~mask).any()
    assert counts.hard == hard.sum() == (max(1, math.floor(hard_share * n + 1e-9)) if n and hard_share else 0)
    assert counts.memorized == memorized.sum() <= math.floor(memorized_share * n + 1e-9)
    assert (values[memorized] < tau / 4).all()
    if hard.any() and (mask & ~hard).any():
        assert values[hard].min() >= values[mask & ~hard].max()
    rest = mask & ~hard & ~memorized
    if memorized.any() and rest.any():
        assert values[memorized].max() <= values[rest].min()


@FAST
@given(score_arrays(ties=False), share_pairs(), st.integers(0, 2**16))
def test_without_ties_the_order_of_tokens_does_not_matter(
    calibrated: Any, shares: tuple[float, float], seed: int
) -> None:
    values = torch.from_numpy(calibrated).flatten()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    straight = select_tokens(values, selection=SelectionConfig(hard_share=shares[0], memorized_share=shares[1]))
    shuffled = select_tokens(values[order], selection=SelectionConfig(hard_share=shares[0], memorized_share=shares[1]))
    torch.testing.assert_close(shuffled.hard, straight.hard[order])
    torch.testing.assert_close(shuffled.memorized, straight.memorized[order])


@FAST
@given(score_arrays(), share_pairs(), st.integers(-40, 40))
def test_shifting_scores_and_tau_together_changes_nothing(
    calibrated: Any, shares: tuple[float, float], by: int
) -> None:
    values = torch.from_numpy(calibrated)
    here = select_tokens(values, selection=SelectionConfig(hard_share=shares[0], memorized_share=shares[1], tau=0.0))
    there = select_tokens(
        values + by / 4, selection=SelectionConfig(hard_share=shares[0], memorized_share=shares[1], tau=by / 4)
    )
    torch.testing.assert_close(here.hard, there.hard)
    torch.testing.assert_close(here.memorized, there.memorized)


@FAST
@given(st.lists(st.lists(st.integers(-6, 6), max_size=7), min_size=1, max_size=5), share_pairs(), st.integers(0, 2**16))
def test_ranks_select_what_one_process_would(parts: list[list[int]], shares: tuple[float, float], seed: int) -> None:
    """Ranks hold different numbers of tokens, some none, with ties across their borders."""
    calibrated = [torch.tensor(part, dtype=torch.float32) / 4 for part in parts]
    masks = [random_mask(seed + rank, part.shape) for rank, part in enumerate(calibrated)]
    options = {"hard_share": shares[0], "memorized_share": shares[1]}
    whole = select_tokens(torch.cat(calibrated), torch.cat(masks), selection=SelectionConfig(**options))
    split = on_ranks(
        len(parts),
        lambda rank, gather: select_tokens(
            calibrated[rank], masks[rank], selection=SelectionConfig(**options), gather=gather
        ),
    )
    torch.testing.assert_close(torch.cat([part.hard for part in split]), whole.hard)
    torch.testing.assert_close(torch.cat([part.memorized for part in split]), whole.memorized)
    assert all(part.counts == whole.counts for part in split)


def test_a_nan_on_one_rank_does_not_move_the_others() -> None:
    parts = [torch.tensor([NAN, 1.0]), torch.tensor([-1.0, NAN, 2.0])]
    split = on_ranks(
        2,
        lambda rank, gather: select_tokens(
            parts[rank], selection=SelectionConfig(hard_share=0.5, memorized_share=0.5), gather=gather
        ),
    )
    assert [picked(part.hard) for part in split] == [[], [2]]
    assert [picked(part.memorized) for part in split] == [[], [0]]
    assert split[0].counts == (3, 1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hard_share": 1.1}, "hard_share"),
        ({"hard_share": -0.1}, "hard_share"),
        ({"memorized_share": -0.1}, "memorized_share"),
        ({"memorized_share": NAN}, "memorized_share"),
        ({"hard_share": 0.9}, "above 1"),
    ],
)
def test_impossible_shares_are_refused_everywhere(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select_tokens(torch.zeros(4), selection=SelectionConfig(**change))
    with pytest.raises(ValueError, match=words):
        SelectionConfig(**change)


def test_shares_that_sum_to_one_up_to_rounding_are_allowed() -> None:
    chosen = select_tokens(
        -torch.arange(1.0, 11.0), selection=SelectionConfig(hard_share=0.7 + 1e-12, memorized_share=0.3)
    )
    assert chosen.counts == (10, 7, 3)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        select_tokens(torch.zeros(4), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tau": NAN}, "tau"),
        ({"tau": INF}, "tau"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": INF}, "alpha"),
        ({"normalize": "per_token"}, "normalize.*'per_set'.*'per_token'"),
        ({"scope": "global"}, "scope.*'micro_batch'.*'global'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SelectionConfig(**change)


def test_the_defaults_are_the_papers() -> None:
    assert dataclasses.asdict(SelectionConfig()) == {
        "hard_share": 0.6,
        "memorized_share": 0.2,
        "tau": 0.0,
        "alpha": 0.8,
        "normalize": "per_set",
        "unlearn": "ascent",
        "scope": "micro_batch",
    }


def test_pydantic_reads_the_settings_strictly() -> None:
    read = TypeAdapter(SelectionConfig).validate_python
    assert read({"alpha": 0.5}) == SelectionConfig(alpha=0.5)
    with pytest.raises(ValidationError, match="alhpa"):
        read({"alhpa": 0.5})
    with pytest.raises(ValidationError, match="above 1"):
        read({"hard_share": 0.9})
