"""One decorator enters an attack; settings, tables and the guide have it from there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError

from dualtok.audit.attacks import registry
from dualtok.audit.attacks.base import ATTACKS, AttackContext, attack
from dualtok.audit.attacks.registry import attack_scores, default_attacks
from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.evaluate import audit_model
from tests.support import ROOT

if TYPE_CHECKING:
    from dualtok.audit.attacks.base import Scores
    from dualtok.audit.signals.signals import Signals
    from tests.audit.conftest import MakeSignals


@pytest.fixture
def shortest(monkeypatch: pytest.MonkeyPatch) -> str:
    """Enter an attack for one test: short documents are members."""
    monkeypatch.setattr("dualtok.audit.attacks.base.ATTACKS", ATTACKS)
    before = dict(ATTACKS)

    @attack("shortest", "Shortest", "minus the number of tokens", headline=True)
    def score(target: Signals, _context: AttackContext) -> Scores:
        return -target.lengths.astype(np.float64)

    yield "shortest"  # type: ignore[misc]
    ATTACKS.clear()
    ATTACKS.update(before)


def test_an_attack_is_everywhere_once_it_is_entered(shortest: str, make_signals: MakeSignals) -> None:
    assert default_attacks()[-1] == shortest
    assert shortest in AuditConfig(attacks=[shortest]).attacks
    members, others = make_signals(1, lengths=(3, 4, 5)), make_signals(2, lengths=(9, 8, 7), first_id=10)
    scored = attack_scores((members, others), (AttackContext(), AttackContext()), [shortest], 0)
    assert scored.scores[shortest][0].tolist() == [-3, -4, -5]
    [result] = audit_model("a", members, others, config=AuditConfig(attacks=[shortest])).attacks
    assert result.name == shortest
    assert result.auc.value == 1.0


def test_a_name_that_is_taken_or_unknown_is_refused(shortest: str) -> None:
    with pytest.raises(ValueError, match="two attacks are called 'shortest'"):
        attack(shortest, "", "")(lambda _target, _context: np.zeros(1))
    with pytest.raises(ValidationError, match="no attack is called 'shortes' \\(did you mean 'shortest'"):
        AuditConfig(attacks=["shortes"])


def test_the_guide_has_every_attack_under_its_column() -> None:
    guide = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:\\\||[^|])+) \|", guide, re.MULTILINE))
    shown = {name: column.replace("\\|", "|") for name, column in rows.items() if name in ATTACKS}
    assert shown == {name: made.label for name, made in registry.ATTACKS.items()}
