"""Made-up signals and reports. Legend as in the audit: n documents, k predicted tokens of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.attacks.registry import names_of
from dualtok.audit.report.data import AuditReport, Checks, Estimate, ModelAudit, SelectionSeries, TrainingSeries
from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics.evaluate import audit_model

MakeSignals = Callable[..., Signals]

ATTACK_NAMES = names_of("single_pass", "joint", "knows_defence")
"""Every attack that needs neither reruns nor shadow models."""


@pytest.fixture(scope="session")
def make_signals() -> MakeSignals:
    """Signals of random documents; ``loss`` is the mean loss of their tokens, in nats."""

    def make(seed: int = 0, *, lengths: Sequence[int] = (7, 3, 1, 12), first_id: int = 0, loss: float = 3.0) -> Signals:
        rng = np.random.default_rng(seed)
        k = sum(lengths)
        return Signals(
            document=first_id + np.arange(len(lengths), dtype=np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            log_prob=-rng.gamma(4.0, loss / 4, k).astype(np.float32),
            rank=np.where(rng.random(k) < 0.3, 0, rng.integers(1, 50, k)).astype(np.int32),
            mean_log_prob=-rng.uniform(1, 6, k).astype(np.float32),
            var_log_prob=rng.uniform(0.5, 4, k).astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def model_rows(make_signals: MakeSignals) -> list[ModelAudit]:
    """Audits of three made-up models: one that knows its members, one that hides them, one without a reference."""
    lengths = np.random.default_rng(1).integers(20, 60, 60).tolist()
    sizes = {document: 90 + document for document in range(160)}
    classes = {}
    for first, kind in ((0, "members"), (100, "non_members")):
        reference = make_signals(first + 7, lengths=lengths, first_id=first)
        rng = np.random.default_rng(first)
        ids = {first + place: rng.integers(0, 40, length) for place, length in enumerate(lengths)}
        classes[kind] = AttackContext(
            reference=reference,
            zlib_bytes=sizes,
            token_ids=ids,
            frequencies=np.full(40, 1 / 40),
            kl_from_reference={document: rng.random(len(own), np.float32) for document, own in ids.items()},
        )

    def row(name: str, member_loss: float, *, contexts: bool = True) -> ModelAudit:
        return audit_model(
            name,
            make_signals(11, lengths=lengths, loss=member_loss),
            make_signals(12, lengths=lengths, first_id=100),
            member_context=classes["members"] if contexts else None,
            non_member_context=classes["non_members"] if contexts else None,
            config=AuditConfig(bootstrap_resamples=200, fpr_targets=[0.1, 0.02, 0.001], attacks=ATTACK_NAMES),
            step=300,
        )

    return [row("plain, last", 2.2), row("dual <best> & final", 2.95), row("base", 3.0, contexts=False)]


@pytest.fixture(scope="session")
def report(model_rows: list[ModelAudit]) -> AuditReport:
    steps = list(range(0, 301, 25))
    hard = [0.6] * len(steps)
    memorized = [min(0.2, step / 1000) for step in steps]
    return AuditReport(
        title="Audit of sotu-small",
        created="2025-01-02T03:04:05+00:00",
        identity={"data": "sotu, 60 members and 60 non-members", "seed": "0"},
        settings=AuditConfig(bootstrap_resamples=200, fpr_targets=[0.1, 0.02, 0.001]),
        rows=model_rows,
        checks=Checks(blind_auc=Estimate(value=0.52, low=0.47, high=0.57), duplicates=0.0, shared_passages=0.01),
        selection=[SelectionSeries(run="dual", steps=steps, hard=hard, memorized=memorized)],
        training=[
            TrainingSeries(run="plain", figure="loss_gap", steps=steps, values=[step / 500 for step in steps]),
            TrainingSeries(run="dual", figure="loss_gap", steps=steps, values=[step / 5000 for step in steps]),
            TrainingSeries(run="dual", figure="ref_auc", steps=steps, values=[0.5 - step / 6000 for step in steps]),
        ],
        configs={"dual": "objective: dual\nselection:\n  alpha: 0.8  # <script>alert(1)</script>\n"},
        versions={"dualtok": "0.1.0", "torch": "2.13.0"},
    )
