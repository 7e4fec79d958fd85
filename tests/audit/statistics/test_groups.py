"""Groups: their scores by naive oracles, and by simulation how often a worst group is found where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.stats

from dualtok.audit.attacks.registry import ATTACKS
from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.group_scores import auc_interval, likeness, normal_scores, side_of
from dualtok.audit.statistics.groups import audit_groups, require_groups
from dualtok.audit.statistics.metrics import roc_auc
from dualtok.errors import DataError

if TYPE_CHECKING:
    from dualtok.audit.report.details import GroupAudit

FIXED = [name for name, made in ATTACKS.items() if made.widening == 1.0][:4]
CONFIG = AuditConfig(group_field="person", permutations=199, bootstrap_resamples=200)


def drawn(seed: int, *, persons: int = 30, style: float = 0.0, planted: float = 0.0, shift: float = 0.0) -> Any:
    """Draw scores of persons with 2 to 11 documents on either side; ``style`` is the share of the variance they are.

    ``planted`` is added to the documents of the first member, of which there are 8.
    """
    rng = np.random.default_rng(seed)
    groups, scores = [], []
    for side in ("member", "other"):
        sizes = rng.integers(2, 12, persons)
        sizes[0] = 8
        groups.append(np.repeat([f"{side} {number}" for number in range(persons)], sizes))
        person = np.repeat(rng.standard_normal((len(FIXED), persons)), sizes, axis=1)
        noise = 0.6 * rng.standard_normal(sizes.sum()) + 0.8 * rng.standard_normal((len(FIXED), sizes.sum()))
        scores.append(np.sqrt(style) * person + np.sqrt(1 - style) * noise)
    scores[0] += shift + planted * (groups[0] == "member 0")
    return {name: (scores[0][row], scores[1][row]) for row, name in enumerate(FIXED)}, *(one.tolist() for one in groups)


def audited(scores: Any, members: Any, others: Any, **changes: Any) -> GroupAudit:
    config = AuditConfig(**{"group_field": "person", "permutations": 199, "bootstrap_resamples": 200, **changes})
    found = audit_groups(scores, members, others, name_of=str, config=config)
    assert found is not None
    return found


def test_groups_are_cut_by_name_and_counted() -> None:
    side = side_of(["b", None, "a", "b", "c", "a", "b", None], 2)
    assert side.names == ["a", "b"]
    assert side.sizes.tolist() == [2, 3]
    assert side.rows.tolist() == [2, 5, 0, 3, 6]
    assert (side.documents, side.without_group, side.small_groups) == (8, 2, 1)
    assert side.sums(np.arange(10.0).reshape(2, 5)).tolist() == [[1, 9], [11, 24]]
    assert side_of([None, None], 2).names == []


def test_normal_scores_are_quantiles_of_ranks_and_bear_infinite_scores() -> None:
    z = normal_scores(np.array([[3.0, np.inf]]), np.array([[-np.inf, 3.0, 1.0]]))
    assert z[0] == pytest.approx(scipy.stats.norm.ppf(np.array([3.5, 5, 1, 3.5, 2]) / 6))


def test_likeness_is_that_of_a_naive_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    names = np.repeat(list("abcdef"), 5)
    scores = rng.standard_normal(30) + 2 * np.repeat(rng.standard_normal(6), 5)
    by_group = scores.reshape(6, 5)
    between, within = 5 * by_group.mean(axis=1).var(ddof=1), by_group.var(axis=1, ddof=1).mean()
    rho = (between - within) / (between + 4 * within)
    error = (1 - rho) * (1 + 4 * rho) * np.sqrt(2 / (5 * 4 * 5))
    assert likeness([(scores[None], side_of(list(names), 2))]) == pytest.approx([min(1, rho + error)])
    alike = np.repeat(rng.standard_normal(6), 5)
    assert likeness([(alike[None], side_of(list(names), 2))]) == pytest.approx([1.0])
    constant = np.zeros((1, 30))
    assert np.isfinite(likeness([(constant, side_of(list(names), 2))])).all()


@pytest.mark.parametrize(("auc", "n", "m"), [(0.7, 4, 30), (0.02, 10, 10), (1.0, 5, 200), (0.0, 2, 3), (0.5, 1, 50)])
def test_the_ends_of_an_aucs_interval_solve_their_equation(auc: float, n: int, m: int) -> None:
    low, high = auc_interval(auc, n, m, 0.95)
    assert 0 <= low <= auc <= high <= 1
    assert high - low > 0.05
    for end in (low, high):
        variance = end * (1 - end) / (n * m)
        variance *= 1 + ((n + m) / 2 - 1) * ((1 - end) / (2 - end) + end / (1 + end))
        if 0 < end < 1:
            assert (auc - end) ** 2 == pytest.approx(scipy.stats.norm.ppf(0.975) ** 2 * variance, rel=1e-6)
    assert auc_interval(1 - auc, n, m, 0.95) == pytest.approx((1 - high, 1 - low))


def test_the_interval_of_an_auc_holds_for_a_handful_of_scores() -> None:
    rng = np.random.default_rng(0)
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))
    ends = [auc_interval(roc_auc(rng.normal(1, 1, 4), rng.normal(0, 1, 40)), 4, 40, 0.95) for _ in range(400)]
    assert np.mean([low <= truth <= high for low, high in ends]) >= 0.92


def test_whole_groups_are_scored_by_mean_and_size() -> None:
    scores, members, others = drawn(1, style=0.2, shift=0.5)
    found = audited(scores, members, others)
    best = 0.0
    for pair in scores.values():
        ranks = scipy.stats.rankdata(np.concatenate(pair)) / (len(members) + len(others) + 1)
        z = scipy.stats.norm.ppf(ranks)
        z = (z - z[len(members) :].mean()) / z[len(members) :].std(ddof=1)
        sides = [(z[: len(members)], side_of(members, 2)), (z[len(members) :], side_of(others, 2))]
        rho = float(likeness([(own[None][:, side.rows], side) for own, side in sides])[0])
        standardized = []
        for own, side in sides:
            values = [
                own[np.array(names) == name] for names in (members, others) for name in side.names if name in names
            ]
            standardized.append([v.mean() * np.sqrt(len(v) / (1 + (len(v) - 1) * rho)) for v in values])
        auc = roc_auc(*standardized)
        best = max(best, auc, 1 - auc)
    assert found.strongest.value == pytest.approx(best)
    assert (found.member_groups, found.non_member_groups, found.attacks) == (30, 30, len(FIXED))
    assert found.strongest.low > 0.5
    assert found.strongest_p_value <= 0.05


def naive_largest(z: np.ndarray, names: np.ndarray, rest: np.ndarray, among: bool) -> float:
    """Return the largest deviation of a group from the rest, or from all: of independent documents."""
    largest = 0.0
    for scores in z:
        for name in set(names) - {""}:
            own = scores[names == name]
            other = -1 / len(rest) if among else 1 / rest.sum()
            compared = scores if among else scores[rest]
            error = compared.std(ddof=1) * np.sqrt(1 / len(own) + other)
            largest = max(largest, abs(own.mean() - compared.mean()) / error)
    return largest


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_p_values_are_those_of_naive_random_groups_over_all_groups_and_attacks(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualtok.audit.statistics.groups.likeness", lambda sides: np.zeros(len(FIXED)))
    monkeypatch.setattr("dualtok.audit.statistics.groups._excess", lambda judged, config: 1.0)
    scores, members, others = drawn(seed, persons=6, planted=0.8)
    found = audited(scores, members, others, permutations=499).worst
    z = normal_scores(*(np.stack([pair[side] for pair in scores.values()]) for side in (0, 1)))
    n, names = len(members), np.array(members + [""] * len(others))
    rest = np.arange(z.shape[1]) >= n
    rng = np.random.default_rng(99)
    observed = naive_largest(z, names, rest, among=False)
    draws = [naive_largest(z[:, rng.permutation(z.shape[1])], names, rest, among=False) for _ in range(499)]
    assert found.p_value == pytest.approx(np.mean([draw >= observed for draw in draws]), abs=0.09)
    # The group is the one that differs most from the non-members; among members its deviation in that attack counts.
    row, own = [ATTACKS[name].label for name in FIXED].index(found.label), names[:n] == found.name
    alone = naive_largest(z[[row], :n], np.where(own, found.name, ""), rest[:n], among=True)
    draws = [naive_largest(z[:, rng.permutation(n)], names[:n], rest[:n], among=True) for _ in range(499)]
    assert found.p_value_among_members == pytest.approx(np.mean([draw >= alone for draw in draws]), abs=0.09)


@pytest.mark.parametrize("style", [0.0, 0.3])
def test_where_nothing_is_given_away_at_most_one_audit_of_twenty_finds_a_worst_group(style: float) -> None:
    trials = 60
    found = [audited(*drawn(seed, style=style)) for seed in range(trials)]
    allowed = scipy.stats.binom.isf(0.005, trials, 0.05)
    for figure in ("p_value", "p_value_among_members"):
        assert sum(getattr(one.worst, figure) <= 0.05 for one in found) <= allowed
    assert sum(one.worst.auc.low > 0.5 for one in found) <= allowed
    assert sum(one.strongest.low > 0.5 for one in found) <= allowed
    assert sum(one.strongest_p_value <= 0.05 for one in found) <= allowed


def test_a_planted_group_is_found_and_a_leak_common_to_all_singles_nobody_out() -> None:
    planted = [audited(*drawn(seed, planted=2.5)) for seed in range(10)]
    assert {one.worst.name for one in planted} == {"member 0"}
    assert {one.worst.documents for one in planted} == {8}
    assert sum(one.worst.p_value <= 0.05 for one in planted) >= 9
    assert sum(one.worst.p_value_among_members <= 0.05 for one in planted) >= 8
    flipped = audited(*drawn(0, planted=-2.5)).worst
    assert flipped.name == "member 0"
    assert flipped.auc.value > 0.9, "two-sided: what was unlearned too far is told as well"
    common = [audited(*drawn(seed, shift=1.5)) for seed in range(10)]
    assert sum(one.worst.p_value <= 0.05 for one in common) >= 9
    assert sum(one.worst.p_value_among_members <= 0.05 for one in common) <= 2


def test_only_the_order_of_scores_counts() -> None:
    scores, members, others = drawn(3, planted=2.0)
    bent = {name: (np.exp(4 * pair[0]), np.exp(4 * pair[1])) for name, pair in scores.items()}
    assert audited(bent, members, others) == audited(scores, members, others)
    pair = scores[FIXED[0]]
    infinite = {**scores, FIXED[0]: tuple(np.where(side > 2, np.inf, side) for side in pair)}
    assert audited(infinite, members, others).worst.name == "member 0"


def test_scores_that_are_all_equal_find_nobody() -> None:
    _, members, others = drawn(0)
    found = audited({"loss": (np.zeros(len(members)), np.zeros(len(others)))}, members, others)
    assert found.strongest.value == found.worst.auc.value == 0.5
    assert found.worst.p_value == found.worst.p_value_among_members == 1.0


def test_single_documents_and_small_groups_are_counted_and_learned_scores_left_out() -> None:
    scores, members, others = drawn(0, planted=3.0)
    members = [None if name == "member 1" else name for name in members]
    sizes = [members.count(name) for name in set(members) - {None}]
    learned = next(name for name, made in ATTACKS.items() if made.widening > 1)
    found = audited({**scores, learned: scores[FIXED[0]]}, members, others, min_group_documents=5)
    assert found.members_without_group == members.count(None) > 0
    assert found.non_members_without_group == 0
    assert found.small_member_groups == sum(size < 5 for size in sizes) > 0
    assert found.member_groups == sum(size >= 5 for size in sizes)
    assert (found.attacks, found.min_documents) == (len(FIXED), 5)
    assert audit_groups({learned: scores[FIXED[0]]}, members, others, name_of=str, config=CONFIG) is None


def test_a_group_on_both_sides_and_too_few_groups_are_refused_without_their_names() -> None:
    sides = ["a"] * 3 + ["b"] * 2, ["b"] * 2 + ["c"] * 2
    with pytest.raises(DataError, match=r"1 groups of 'person' have documents among the members and") as caught:
        require_groups(*sides, field="person", min_documents=2)
    assert "data.group_field" in str(caught.value)
    with pytest.raises(DataError, match=r"the non-members have 1 groups of 'person' with 3 documents or more"):
        require_groups([f"p{number // 3}" for number in range(15)], ["q"] * 3, field="person", min_documents=3)


def test_settings_of_groups_need_a_field() -> None:
    for changes in ({"min_group_documents": 3}, {"show_group_names": True}):
        with pytest.raises(ValueError, match=r"has no effect without audit\.group_field"):
            AuditConfig(**changes)
