"""A report as large as they come, and one as small, both made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dualtok.audit.attacks.base import ATTACKS
from dualtok.audit.report.base import Estimate
from dualtok.audit.report.data import (
    AttackResult,
    AuditReport,
    CanaryAudit,
    CanaryScore,
    Collections,
    EpsilonBound,
    Exposures,
    ModelAudit,
    RocPoints,
    Strongest,
    StrongestTpr,
    TokenHistogram,
    TprAtFpr,
)
from dualtok.audit.report.details import (
    AttackReference,
    Continuations,
    GateCheck,
    GateVerdict,
    Group,
    GroupAudit,
    LengthCost,
    Power,
    Regurgitation,
    RunLengths,
    WithinBits,
)

MODELS = (
    "plain, last epoch",
    "plain, best",
    "dual",
    "dual, interpolated",
    "goldfish",
    "dp-sgd, eps 8",
    "lora-r16",
    "base",
)
AUCS = (0.951, 0.874, 0.612, 0.548, 0.655, 0.531, 0.702, 0.503)
N_DOCUMENTS = 418


def around(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half))


def attack(name: str, label: str, auc: float) -> AttackResult:
    fpr = np.geomspace(1 / N_DOCUMENTS, 1, 40)
    tpr = fpr ** ((1 - auc) / auc)
    rates = [
        TprAtFpr(target_fpr=0.1, tpr=around(float(0.1 ** ((1 - auc) / auc)), 0.05), attained_fpr=0.0981),
        TprAtFpr(
            target_fpr=0.01, tpr=around(float(0.01 ** ((1 - auc) / auc)), 0.04), attained_fpr=0.0096, note="coarse"
        ),
        TprAtFpr(target_fpr=0.001, note=f"n/a: {N_DOCUMENTS} non-members, fewer than 1/0.001"),
    ]
    two_sided = max(auc, 1 - auc)
    return AttackResult(
        name=name,
        label=label,
        auc=around(auc, 0.04),
        auc_two_sided=Estimate(value=two_sided, low=max(0.5, two_sided - 0.04), high=min(1, two_sided + 0.04)),
        tpr=rates,
        roc=RocPoints(fpr=[0.0, *fpr.tolist()], tpr=[0.0, *tpr.tolist()]),
    )


def canaries(auc: float) -> CanaryAudit:
    rng = np.random.default_rng(3)
    found = max(0.0, auc - 0.6)
    included, excluded = (20 * rng.random(50) ** (1 if scale > 0.1 else 3) for scale in (found, 0))
    exposures = Exposures(included=included.tolist(), excluded=excluded.tolist())
    return CanaryAudit(
        n_included=50,
        n_excluded=50,
        scores=[CanaryScore(label="Loss", auc=around(auc, 0.08)), CanaryScore(label="Ref", auc=around(auc, 0.07))],
        epsilon=[
            EpsilonBound(delta=delta, epsilon=max(0, auc - 0.6) * 6, label="Ref", guesses=50, correct=40, tests=8)
            for delta in (0, 1e-5)
        ],
        other_bounds=[EpsilonBound(method="f_dp", delta=0, epsilon=1.25, label="Ref", guesses=50, correct=40, tests=8)],
        space_bits=19.9,
        candidates=100,
        ranked=exposures,
        extrapolated=exposures,
        extracted_included=Estimate(value=found, low=found / 2, high=min(1, found + 0.1)),
        extracted_excluded=Estimate(value=0, low=0, high=0.07),
    )


def cost(length: int, auc: float) -> LengthCost:
    return LengthCost(
        length=length,
        n_members=N_DOCUMENTS,
        n_non_members=N_DOCUMENTS,
        bits_members=(1 - auc) * length,
        bits_non_members=None,
        greedy_windows_members=0.1,
        greedy_windows_non_members=0.0,
        within=[WithinBits(bits=0, members=around(0.1, 0.05), non_members=None)],
    )


CONTINUATIONS = Continuations(
    prefix=32,
    tokens=64,
    members=[],
    non_members=[],
    whole_members=around(0.25, 0.1),
    whole_non_members=Estimate(value=0, low=0, high=0.17),
    runs_members=RunLengths(median=12.5, largest=64),
    runs_non_members=RunLengths(median=3, largest=9),
)


def groups_of(auc: float) -> GroupAudit:
    return GroupAudit(
        field="person",
        min_documents=2,
        attacks=20,
        members_without_group=0,
        non_members_without_group=0,
        small_member_groups=0,
        small_non_member_groups=0,
        strongest_p_value=0.01,
        member_groups=80,
        non_member_groups=80,
        strongest_label="Ref",
        strongest=Estimate(value=auc, low=max(0.5, auc - 0.1), high=min(1, auc + 0.1)),
        worst=Group(
            name="9f2c61d0",
            documents=14,
            label="Ref",
            auc=around(min(auc + 0.05, 1), 0.09),
            p_value=0.01,
            p_value_among_members=0.2,
        ),
    )


def model(name: str, auc: float, names: dict[str, str], perplexity: float) -> ModelAudit:
    rng = np.random.default_rng(len(name))
    aucs = {one: 0.5 + (auc - 0.5) * float(rng.uniform(-0.2, 0.9)) for one in names} | {"ref": auc}
    counts = [round(400 * np.exp(-abs(place - 32) / 6)) for place in range(64)]
    low = max(0.5, auc - 0.045)
    return ModelAudit(
        name=name,
        step=300,
        n_members=N_DOCUMENTS,
        n_non_members=N_DOCUMENTS,
        perplexity_members=perplexity * (1.1 - auc / 2),
        perplexity_non_members=perplexity,
        loss_gap=(auc - 0.5) / 2,
        attacks=[attack(one, label, aucs[one]) for one, label in names.items()],
        strongest=Strongest(label="Ref", auc_two_sided=Estimate(value=auc, low=low, high=min(1, auc + 0.045))),
        strongest_p_value=0.001 if low > 0.5 else 0.4,
        collections=[
            Collections(
                label=label,
                size=size,
                p_value=0.001 if auc > 0.56 else 0.4,
                p_holm=0.006 if auc > 0.56 else 0.9,
                collections=N_DOCUMENTS // size,
                rejected=0.9,
                rejected_low=0.6,
                rejected_high=1,
            )
            for label in ("Ref", "learned")
            for size in (10, 50)
        ],
        calibrated=TokenHistogram(
            edges=np.linspace(-8, 8, 65).tolist(),
            members=counts,
            non_members=counts[::-1],
            mean_members=-0.3,
            mean_non_members=0.1,
        ),
        strongest_tpr=[StrongestTpr(target_fpr=0.01, label="Ref", tpr=around(max(0.01, (auc - 0.5)), 0.01))],
        power=Power(auc=0.58, probability=0.8, simulations=200),
        canaries=canaries(auc),
        regurgitation=Regurgitation(
            length=50,
            extracted_members=Estimate(value=max(0, auc - 0.8), low=max(0, auc - 0.82), high=0.2),
            extracted_non_members=Estimate(value=0, low=0, high=0.009),
            costs=[cost(length, auc) for length in (20, 50)],
            continuations=CONTINUATIONS,
        ),
        groups=groups_of(auc),
    )


@pytest.fixture(scope="session")
def large_report(report: AuditReport) -> AuditReport:
    """8 models, every attack and one that this version does not know, and all else that a report can hold."""
    names = {name: made.label for name, made in ATTACKS.items()} | {"extra": "Extra"}
    rows = [
        model(name, auc, names, 32 + 3.5 * place) for place, (name, auc) in enumerate(zip(MODELS, AUCS, strict=True))
    ]
    checks = [
        GateCheck(model=name, figure="strongest AUC", limit=0.6, value=auc, verdict="above")
        for name, auc in zip(MODELS, AUCS, strict=True)
    ]
    return report.model_copy(
        update={
            "rows": rows,
            "settings": replace(report.settings, fpr_targets=[0.1, 0.01, 0.001]),
            "references": [AttackReference(name="aux-3ep", perplexity_members=61.0, perplexity_non_members=61.3)],
            "gate": GateVerdict(verdict="above", checks=checks),
            "hashes": {"data": "3f" * 32, "code": "a1" * 32, **{f"model {name}": "0c" * 32 for name in MODELS}},
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_report(report: AuditReport) -> AuditReport:
    """One model without a reference, of an earlier version: nothing but attacks."""
    later: dict[str, object] = {"power": None, "groups": None, "regurgitation": None, "strongest_tpr": []}
    return AuditReport(
        title="Audit of one model",
        created="2025-01-02T03:04:05+00:00",
        rows=[report.rows[2].model_copy(update=later)],
        settings=report.settings,
    )
