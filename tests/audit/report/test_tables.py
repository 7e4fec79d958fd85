from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from dualtok.audit.attacks.registry import names_of
from dualtok.audit.report.data import Estimate, ModelAudit
from dualtok.audit.report.details import Continuation, Continuations, RunLengths
from dualtok.audit.report.tables import (
    PUBLISHED,
    adaptive_table,
    attack_columns,
    collection_table,
    comparison_table,
    interval,
    perplexity,
    regurgitation_table,
    share,
    token_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

KNOWING = names_of("knows_defence")


def rendered(rows: list[ModelAudit], make: Callable[[list[ModelAudit]], Table] = comparison_table) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(make(rows))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_numbers() -> None:
    assert [share(x) for x in (0.0, 0.4996, 0.9666, 1.0)] == [".000", ".500", ".967", "1.000"]
    assert interval(Estimate(value=0.5, low=0.0, high=1.0)) == "[.000, 1.000]"
    assert [perplexity(x) for x in (12.7291, 999.9, 34429.4, float("inf"))] == ["12.729", "999.900", "3.443e+04", "inf"]


def test_every_model_and_attack_is_in_the_table(model_rows: list[ModelAudit]) -> None:
    text = rendered(model_rows)
    for row in model_rows:
        assert row.name in text
        assert perplexity(row.perplexity_non_members) in text
        for attack in (attack for attack in row.attacks if attack.name in PUBLISHED):
            assert share(attack.auc.value) in text
            assert f"{share(attack.auc.low, 2)}-{share(attack.auc.high, 2)}" in text
    assert text.count("n/a") == 2
    # The order is that of the attacks, not of the first row, which may lack a reference.
    assert list(attack_columns(model_rows[::-1]).values())[:5] == ["Loss", "Ref", "Zlib", "Min-K%", "Min-K%++"]


def test_what_knows_the_defence_and_collections_have_a_table_of_their_own(model_rows: list[ModelAudit]) -> None:
    text = rendered(model_rows, adaptive_table)
    for row in model_rows:
        assert row.name in text
        for attack in (attack for attack in row.attacks if attack.name in KNOWING):
            assert f"{share(attack.auc.low, 2)}-{share(attack.auc.high, 2)}" in text
        assert row.strongest_p_value is not None
        assert share(row.strongest_p_value) in text
        collections = rendered(model_rows, collection_table)
        for test in row.collections:
            assert share(test.p_holm) in collections
            assert f"{share(test.rejected, 2)} of {test.collections}" in collections
    assert "Forest" in text


def test_every_attack_is_in_one_of_the_tables(model_rows: list[ModelAudit]) -> None:
    text = rendered(model_rows, token_table)
    for row in model_rows:
        assert row.name in text
        for attack in (attack for attack in row.attacks if attack.name not in {*PUBLISHED, *KNOWING}):
            assert attack.label in text
            assert f"{share(attack.auc.low, 2)}-{share(attack.auc.high, 2)}" in text
    assert text.count("n/a") == 6, "base has neither a reference nor frequencies"


def with_continuations(rows: list[ModelAudit]) -> list[ModelAudit]:
    """The rows as if their models had continued three documents of each class."""
    share_of_three = Estimate(value=1 / 3, low=0.0084, high=0.9057)
    written = Continuations(
        prefix=50,
        tokens=40,
        members=[Continuation(document=n, verbatim=own, common=own) for n, own in ((3, 40), (4, 0), (9, 7))],
        non_members=[Continuation(document=n, verbatim=1, common=2) for n in (100, 101, 102)],
        whole_members=share_of_three,
        whole_non_members=Estimate(value=0.0, low=0.0, high=0.7076),
        runs_members=RunLengths(median=7, largest=40),
        runs_non_members=RunLengths(median=2, largest=2),
    )
    found = [row.regurgitation for row in rows if row.regurgitation is not None]
    assert len(found) == len(rows)
    both = [own.model_copy(update={"continuations": written}) for own in found]
    return [row.model_copy(update={"regurgitation": own}) for row, own in zip(rows, both, strict=True)]


def test_regurgitation_has_a_table_with_both_classes(model_rows: list[ModelAudit]) -> None:
    text = rendered(model_rows, regurgitation_table)
    assert "continued" not in text
    for row in model_rows:
        own = row.regurgitation
        assert row.name in text
        assert own is not None
        assert own.length == 25, "the documents have 20 to 59 tokens"
        for estimate in (own.extracted_members, own.extracted_non_members):
            assert f"{share(estimate.low, 2)}-{share(estimate.high, 2)}" in text
        cost = next(cost for cost in own.costs if cost.length == 25)
        assert f"{cost.bits_members:.1f} /" in text
        assert f"{own.greedy_members:.3f} /" in text
    text = rendered(with_continuations(model_rows), regurgitation_table)
    assert "40 after 50" in text
    for cell in (".333", ".01-.91", ".00-.71", "40 /"):
        assert text.count(cell) >= len(model_rows)
    without = [row.model_copy(update={"regurgitation": None}) for row in model_rows]
    assert regurgitation_table(without).row_count == 0


def test_tables_fit_a_terminal_of_120_columns(model_rows: list[ModelAudit]) -> None:
    sizes = [test.model_copy(update={"size": size}) for test in model_rows[0].collections for size in (50, 500)]
    rows = [
        row.model_copy(update={"collections": [*row.collections, *sizes]}) for row in with_continuations(model_rows)
    ]
    for make in (comparison_table, token_table, adaptive_table, collection_table, regurgitation_table):
        wide = max(map(len, rendered(rows, make).splitlines()))
        assert wide <= 120, make


def test_a_name_in_brackets_is_printed_as_it_stands(model_rows: list[ModelAudit]) -> None:
    row = model_rows[0].model_copy(update={"name": "dual [bold]x[/bold]"})
    assert "dual [bold]x[/bold]" in rendered([row])
