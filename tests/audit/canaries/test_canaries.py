"""The audit of canaries from signals to report."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from dualtok.audit.canaries.audit import CanaryTexts, audit_canaries, extractions
from dualtok.audit.report.data import AuditReport, CanaryAudit, ModelAudit
from dualtok.audit.report.page import render_html
from dualtok.audit.report.tables import bound_table, canary_table
from dualtok.audit.report.write import render_csv
from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.signals import Signals

COUNT, CANDIDATES, TOKENS = 40, 30, 9
CONFIG = AuditConfig(bootstrap_resamples=100, canary_guesses=(0.5, 1.0))


def signals(numbers: np.ndarray, means: np.ndarray, seed: int = 0, known: np.ndarray | None = None) -> Signals:
    """Return documents of 9 predicted tokens each with about these mean losses."""
    rng = np.random.default_rng(seed)
    k = len(numbers) * TOKENS
    top1 = rng.random(k) < 0.5 if known is None else np.repeat(known, TOKENS)
    return Signals(
        document=numbers,
        offsets=np.arange(len(numbers) + 1) * TOKENS,
        log_prob=-np.repeat(means, TOKENS).astype(np.float32) * rng.uniform(0.9, 1.1, k).astype(np.float32),
        rank=np.where(top1, 0, 3).astype(np.int32),
        mean_log_prob=np.full(k, -2, np.float32),
        var_log_prob=np.ones(k, np.float32),
    )


@pytest.fixture(scope="module")
def included() -> np.ndarray:
    return np.random.default_rng(5).random(COUNT) < 0.5


def audited(included: np.ndarray, *, learned: bool, reference: bool) -> CanaryAudit:
    rows, step = COUNT * (CANDIDATES + 1), CANDIDATES + 1
    means = np.random.default_rng(1).normal(3, 0.3, rows)
    known = np.zeros(rows, dtype=bool)
    if learned:
        means[::step][included] = 0.2
        known[::step] = included
    texts = CanaryTexts(included, np.tile([4, TOKENS], (COUNT, 1)), CANDIDATES, 10**6)
    target = signals(np.arange(rows), means, known=known)
    other = signals(np.arange(COUNT) * step, np.random.default_rng(2).normal(3, 0.3, COUNT), 3) if reference else None
    return audit_canaries(target, texts, CONFIG, other)


@pytest.fixture(scope="module")
def found(included: np.ndarray) -> CanaryAudit:
    return audited(included, learned=True, reference=True)


def test_learned_canaries_are_found(found: CanaryAudit, included: np.ndarray) -> None:
    assert (found.n_included, found.n_excluded) == (included.sum(), COUNT - included.sum())
    assert [score.label for score in found.scores] == ["Loss", "Ref"]
    assert all(score.auc is not None and score.auc.value > 0.99 for score in found.scores)
    assert np.median(found.ranked.included) == pytest.approx(math.log2(CANDIDATES + 1))
    assert np.median(found.extrapolated.included) > 15
    assert np.median(found.extrapolated.excluded) < 3
    assert max(found.extrapolated.included) <= found.space_bits == pytest.approx(math.log2(10**6))
    assert found.extracted_included is not None
    assert found.extracted_excluded is not None
    assert (found.extracted_included.value, found.extracted_excluded.value) == (1, 0)
    pure, approximate = found.epsilon
    assert (pure.delta, approximate.delta, pure.tests) == (0, 1e-5, 4)
    assert (pure.guesses, pure.correct) == (40, 39), "21 were included, 20 were guessed to be"
    q = scipy.stats.beta.ppf(0.05 / 4, 39, 2)
    assert pure.epsilon == pytest.approx(math.log(q / (1 - q)))
    assert 1 < approximate.epsilon < pure.epsilon


def test_nothing_is_found_where_nothing_was_learned(included: np.ndarray) -> None:
    nothing = audited(included, learned=False, reference=False)
    assert [score.label for score in nothing.scores] == ["Loss"]
    auc = nothing.scores[0].auc
    assert auc is not None
    assert auc.low < 0.5 < auc.high
    assert [bound.epsilon for bound in nothing.epsilon] == [0, 0]
    assert nothing.extracted_included is not None
    assert nothing.extracted_included.value == 0


def test_coins_that_all_fell_alike_leave_no_comparison() -> None:
    alone = audited(np.ones(COUNT, dtype=bool), learned=True, reference=False)
    assert alone.scores[0].auc is None
    assert alone.extracted_excluded is None
    assert alone.ranked.excluded == []


def without_candidates(included: np.ndarray, secret: np.ndarray | None, *, judged_by_secret: bool) -> CanaryAudit:
    """Audit canaries of which the included ones are known by their last token alone."""
    target = signals(np.arange(COUNT), np.full(COUNT, 3.0))
    target.log_prob.reshape(COUNT, TOKENS)[:, -2] = np.where(included, -2.9, -3.1)
    texts = CanaryTexts(included, secret, 0, 1, kind="some", judged_by_secret=judged_by_secret)
    return audit_canaries(target, texts, CONFIG)


def test_canaries_without_candidates_have_no_exposure_and_break_no_table(
    report: AuditReport, included: np.ndarray
) -> None:
    spans = np.tile([TOKENS - 1, TOKENS], (COUNT, 1))
    by_token = without_candidates(included, spans, judged_by_secret=True)
    whole = without_candidates(included, None, judged_by_secret=False)
    aucs = [found.scores[0].auc for found in (by_token, whole)]
    assert aucs[0] is not None
    assert aucs[0].value == 1
    assert aucs[1] is not None
    assert aucs[1].value < 0.95
    assert (whole.kind, whole.candidates, whole.space_bits) == ("some", 0, 0)
    assert whole.ranked.included == whole.extrapolated.excluded == []
    assert whole.extracted_included is whole.extracted_excluded is None
    assert by_token.extracted_included is not None
    rows = [row.model_copy(update={"canaries": whole}) for row in report.rows]
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(canary_table(rows))
    assert "n/a / n/a" in console.file.getvalue()  # type: ignore[attr-defined]
    shown = report.model_copy(update={"rows": rows})
    assert "<h2>Canaries</h2>" in render_html(shown)
    assert "canary_exposure" not in render_csv(shown)


def test_the_bounds_of_all_methods_stand_side_by_side(report: AuditReport, found: CanaryAudit) -> None:
    rows = [report.rows[0].model_copy(update={"canaries": found}), *report.rows[1:]]
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(bound_table(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for bound in (*found.epsilon, *found.other_bounds):
        assert f"{bound.epsilon:.2f}" in text
        assert bound.mu is None or f"mu {bound.mu:.2f}" in text
    lines = {
        line["metric"]: line
        for line in csv.DictReader(io.StringIO(render_csv(report.model_copy(update={"rows": rows}))))
    }
    gaussian = found.other_bounds[-1]
    assert float(lines["canary_mu_independent_gaussian"]["value"]) == gaussian.mu
    assert float(lines["canary_epsilon_independent_gaussian"]["value"]) == gaussian.epsilon
    assert bound_table(report.rows).row_count == 0


def test_a_secret_is_extracted_if_each_of_its_tokens_is_the_likeliest() -> None:
    one = signals(np.arange(3), np.ones(3))
    top1 = np.ones((3, TOKENS), dtype=bool)
    top1[0, 2] = False  # token 3, the prefix's last
    top1[1, 3] = False  # token 4, the secret's first
    top1[2, 8] = False  # token 9, the end
    one = Signals(**{**vars(one), "rank": np.where(top1, 0, 1).ravel().astype(np.int32)})
    assert extractions(one, np.array([[4, 9]] * 3)).tolist() == [True, False, True]
    assert extractions(one, np.array([[3, 9], [5, 9], [4, 10]])).tolist() == [False, True, False]


def test_table_page_json_and_csv_show_it(report: AuditReport, found: CanaryAudit, included: np.ndarray) -> None:
    first, second = (
        row.model_copy(update={"canaries": one})
        for row, one in zip(report.rows, (found, audited(included, learned=False, reference=True)), strict=False)
    )
    rows: list[ModelAudit] = [first, second, report.rows[2]]
    shown = report.model_copy(update={"rows": rows})
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(canary_table(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    bound = found.epsilon[0]
    assert f"{bound.epsilon:.2f}" in text
    assert f"{bound.correct} of {bound.guesses}" in text
    assert "1.00 / .00" in text
    page = render_html(shown)
    start = page.index('id="canary-tests"')
    section = page[start : page.index('<details class="fold"', start)]
    assert section.count("<svg") == 2
    assert f"<b>{bound.epsilon:.2f}</b><small>39 of 40, Loss</small>" in section
    assert "<h2>Canaries</h2>" not in render_html(report)
    assert AuditReport.model_validate_json(shown.model_dump_json()) == shown
    lines = [line for line in csv.DictReader(io.StringIO(render_csv(shown))) if line["metric"].startswith("canary_")]
    mine = {
        (line["metric"], line["attack"], line["note"].split(":")[0]): line
        for line in lines
        if line["model"] == first.name
    }
    assert {line["model"] for line in lines} == {first.name, second.name}
    assert float(mine["canary_epsilon", "loss", "delta 0"]["value"]) == bound.epsilon
    assert float(mine["canary_extracted_included", "", ""]["value"]) == 1
    assert float(mine["canary_exposure_ranked_included", "", ""]["value"]) == np.median(found.ranked.included)
