"""An audit of a class in parts says what the audit of the whole says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals import files
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics.evaluate import audit_model, audit_parts
from dualtok.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

MakeSignals = Callable[..., Signals]
CONFIG = AuditConfig(bootstrap_resamples=100, collections=(10,), permutations=99)
LENGTHS = (9, 14, 0, 30, 22, 11) * 5
Part = tuple[Signals, AttackContext]


def whole(make_signals: MakeSignals, first: int) -> Part:
    reference = make_signals(first + 3, lengths=LENGTHS, first_id=first)
    sizes = {first + document: 40 + document % 13 for document in range(len(LENGTHS))}
    return make_signals(first, lengths=LENGTHS, first_id=first), AttackContext(reference=reference, zlib_bytes=sizes)


def cut(part: Part, *ends: int) -> Iterator[Part]:
    signals, context = part
    for positions in np.split(np.arange(signals.n_documents), ends):
        assert context.reference is not None
        yield signals.take(positions), replace(context, reference=context.reference.take(positions))


def test_parts_give_the_row_of_the_whole(make_signals: MakeSignals) -> None:
    members, others = whole(make_signals, 0), whole(make_signals, 500)
    row = audit_model(
        "m", members[0], others[0], member_context=members[1], non_member_context=others[1], config=CONFIG
    )
    parts = audit_parts("m", cut(members, 2, 3, 11), cut(others, 20), config=CONFIG)
    assert row.members_left_out == 5
    assert row.power is not None
    sums = ("perplexity_members", "perplexity_non_members", "loss_gap", "calibrated")
    assert parts.model_copy(update={name: getattr(row, name) for name in sums}) == row
    for name in sums[:3]:
        assert getattr(parts, name) == pytest.approx(getattr(row, name), rel=1e-12)
    assert row.calibrated is not None
    assert parts.calibrated is not None
    assert (parts.calibrated.members, parts.calibrated.non_members) == (
        row.calibrated.members,
        row.calibrated.non_members,
    )
    assert parts.calibrated.mean_members == pytest.approx(row.calibrated.mean_members, rel=1e-12)


def test_a_part_without_what_the_first_had_is_an_error(make_signals: MakeSignals) -> None:
    members, others = whole(make_signals, 0), whole(make_signals, 500)
    first, second = cut(members, 10)
    with pytest.raises(DataError, match="from document 10 on the attacker has no reference, zlib"):
        audit_parts("m", [first, (second[0], AttackContext())], [others], config=CONFIG)
    with pytest.raises(DataError, match="no members with at least two tokens"):
        audit_parts("m", [], [others], config=CONFIG)


def test_files_of_two_models_are_read_side_by_side(
    make_signals: MakeSignals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "GROUP_TOKENS", 60)
    signals, context = whole(make_signals, 0)
    assert context.reference is not None
    signals.save(tmp_path / "model")
    context.reference.save(tmp_path / "reference")
    pairs = list(Signals.stream_pairs(tmp_path / "model", tmp_path / "reference"))
    assert len(pairs) > 3
    for own, reference in pairs:
        assert own.document.tolist() == reference.document.tolist()
    np.testing.assert_array_equal(np.concatenate([own.log_prob for own, _ in pairs]), signals.log_prob)
    np.testing.assert_array_equal(np.concatenate([other.top1 for _, other in pairs]), context.reference.top1)
    signals.take(np.arange(9)).save(tmp_path / "fewer")
    make_signals(1, lengths=(14, 9, *LENGTHS[2:])).save(tmp_path / "other lengths")
    for wrong in ("fewer", "other lengths"):
        with pytest.raises(DataError, match=f"model and .*{wrong} are of other documents or lengths"):
            list(Signals.stream_pairs(tmp_path / "model", tmp_path / wrong))
        with pytest.raises(DataError, match="other documents or lengths"):
            list(Signals.stream_pairs(tmp_path / wrong, tmp_path / "model"))
