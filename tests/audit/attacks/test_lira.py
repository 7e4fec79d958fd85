"""LiRA against the paper's definition, written with scipy one document at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.stats
from pydantic import TypeAdapter, ValidationError

from dualtok.audit.attacks.base import AttackContext, ShadowFit
from dualtok.audit.attacks.lira import PER_DOCUMENT_FROM, fit_shadows, statistic
from dualtok.audit.attacks.registry import ATTACKS
from dualtok.audit.report.tables import adaptive_table
from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.evaluate import audit_model
from dualtok.data.folds import in_shadow
from dualtok.errors import DataError

if TYPE_CHECKING:
    from tests.audit.conftest import MakeSignals

LENGTHS = (7, 3, 1, 12, 30, 9)


def drawn(shadows: int, n: int = len(LENGTHS)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, statistics [s, n] and which shadow learned which document [s, n]."""
    rng = np.random.default_rng(shadows)
    documents = np.arange(n) * 3
    inside = np.stack([in_shadow(documents, number, 5) for number in range(shadows)])
    values = rng.normal(-3, 1, n) + rng.normal(0, 0.3, (shadows, n)) + inside * rng.uniform(0, 1, n)
    return documents, values, inside


def oracle(values: np.ndarray, inside: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Return mean and deviation of the IN, and of the OUT values of each document."""
    shadows, n = values.shape
    sides = []
    for wanted in (True, False):
        lists = [[values[s, d] for s in range(shadows) if inside[s, d] == wanted] for d in range(n)]
        means = [sum(found) / len(found) for found in lists]
        if shadows >= 64:
            sigmas = [float(np.std(found)) for found in lists]
        else:
            residuals = [value - mean for found, mean in zip(lists, means, strict=True) for value in found]
            freedom = sum(len(found) - 1 for found in lists)
            sigmas = [(sum(r * r for r in residuals) / freedom) ** 0.5 if freedom else float("nan")] * n
        sides.append((means, sigmas))
    if shadows == 2:
        gaps = np.array(sides[0][0]) - np.array(sides[1][0])
        common = [float(np.sqrt(np.mean((gaps - gaps.mean()) ** 2) / 2))] * n
        sides = [(means, common) for means, _ in sides]
    return [(sides[0][0][d], sides[0][1][d], sides[1][0][d], sides[1][1][d]) for d in range(n)]


@pytest.mark.parametrize("shadows", [2, 4, 10, PER_DOCUMENT_FROM])
def test_scores_are_the_papers(make_signals: MakeSignals, shadows: int) -> None:
    documents, values, inside = drawn(shadows)
    target = make_signals(3, lengths=LENGTHS)
    target = type(target)(
        **{**{name: getattr(target, name) for name in target.__dataclass_fields__}, "document": documents}
    )
    context = AttackContext(shadows=fit_shadows(documents, values, inside))
    online, offline = ATTACKS["lira"](target, context), ATTACKS["lira_offline"](target, context)
    for place, (mean_in, sigma_in, mean_out, sigma_out) in enumerate(oracle(values, inside)):
        tokens = target.log_prob[target.offsets[place] : target.offsets[place + 1]].astype(np.float64)
        p = np.exp(np.mean(tokens))
        phi = np.log(p / (1 - p))
        ratio = scipy.stats.norm.logpdf(phi, mean_in, sigma_in) - scipy.stats.norm.logpdf(phi, mean_out, sigma_out)
        assert online[place] == pytest.approx(ratio, rel=1e-9, abs=1e-9)
        assert scipy.stats.norm.cdf(offline[place]) == pytest.approx(
            1 - scipy.stats.norm(mean_out, sigma_out).sf(phi), abs=1e-12
        )


def test_the_statistic_stays_finite_at_both_ends() -> None:
    found = statistic(np.array([0.0, 1e-9, np.log(2), 40.0, 2000.0]))
    assert np.isfinite(found).all()
    assert found[2] == pytest.approx(0, abs=1e-15)
    assert found[3:].tolist() == [-40.0, -2000.0]
    assert found[0] == found[1] == pytest.approx(-np.log(1e-6), rel=1e-6)


def test_shadows_that_agree_exactly_leave_finite_scores() -> None:
    documents, values, inside = drawn(4)
    fit = fit_shadows(documents, np.ones_like(values), inside)
    assert (fit.sigma_in > 0).all()
    assert (fit.sigma_out > 0).all()


def test_documents_are_found_by_id_in_any_order() -> None:
    fit = fit_shadows(*drawn(4))
    some = fit.of(np.array([9, 0, 15]))
    assert some.mean_in.tolist() == fit.mean_in[[3, 0, 5]].tolist()
    with pytest.raises(DataError, match="not run over document 16"):
        fit.of(np.array([0, 16]))
    with pytest.raises(ValueError, match="no shadow that learned it"):
        fit_shadows(np.arange(2), np.zeros((2, 2)), np.array([[True, True], [True, False]]))


def test_a_document_that_is_easy_for_everyone_is_no_member(make_signals: MakeSignals) -> None:
    """What sets LiRA apart from the loss: easy non-members, hard members."""
    n = 40
    easy, hard = np.full(n, 1.0), np.full(n, 4.0)
    documents = np.arange(2 * n)
    out = statistic(np.concatenate([hard, easy]))
    fit = ShadowFit(documents, out + 0.5, out, np.full(2 * n, 0.2), np.full(2 * n, 0.2))
    members = make_signals(1, lengths=[200] * n, loss=3.5)
    others = make_signals(2, lengths=[200] * n, first_id=n, loss=1.0)
    config = AuditConfig(attacks=("loss", "lira", "lira_offline"), shadows=4, bootstrap_resamples=100)
    context = AttackContext(shadows=fit)
    row = audit_model("m", members, others, member_context=context, non_member_context=context, config=config)
    auc = {attack.name: attack.auc.value for attack in row.attacks}
    assert auc["loss"] < 0.05
    assert min(auc["lira"], auc["lira_offline"]) > 0.8
    assert [str(column.header) for column in adaptive_table([row]).columns] == ["model", "LiRA", "LiRA out", "p"]
    without = audit_model("m", members, others, config=config)
    assert without.not_run == {"LiRA": "needs shadows", "LiRA out": "needs shadows"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shadows": 3}, "3 is odd"),
        ({"shadows": 0}, "greater than or equal to 2"),
        ({"attacks": ["loss", "lira"]}, "'lira' needs shadow models"),
        ({"shadow_checkpoint": "latest"}, "has no effect without audit.shadows"),
    ],
)
def test_settings_of_shadows_are_checked(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(AuditConfig).validate_python(wrong)


def test_their_attacks_join_the_others_once() -> None:
    config = AuditConfig(shadows=2)
    assert config.attacks == (*AuditConfig().attacks, "lira", "lira_offline", "shadow_classifier")
    again = TypeAdapter(AuditConfig).validate_python(TypeAdapter(AuditConfig).dump_python(config))
    assert again == config
    assert AuditConfig(shadows=2, attacks=("loss", "lira")).attacks == ("loss", "lira")
