"""The audit by groups: what prepared data must have, hidden names, and a run through the command line."""

from __future__ import annotations

import csv
import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from dualtok.audit.settings import AuditConfig
from dualtok.commands.audit.groups import KEY_FILE, check_groups, document_groups, hidden_names
from dualtok.data.sources.corpora import sotu_passages
from dualtok.errors import ConfigError, DataError
from tests.support import dualtok, error_line, save_model, succeed, write_run

if TYPE_CHECKING:
    from pathlib import Path


class Prepared:
    """Stands for a prepared folder: its tables of documents, and the field they were grouped by."""

    def __init__(self, group_field: str | None, **groups: list[str | None]) -> None:
        self.manifest = type("Manifest", (), {"config": {"group_field": group_field}})
        self.tables = {
            split: pa.table({"doc": range(len(names)), "group" if group_field else "other": names})
            for split, names in groups.items()
        }

    def __str__(self) -> str:
        return "prepared"

    def documents(self, split: str) -> pa.Table:
        return self.tables[split]


def names(kind: str, count: int = 20) -> list[str | None]:
    return [f"{kind} {number // 2}" for number in range(count)]


def nothing(split: str) -> set[int]:
    return set()


SETTINGS = AuditConfig(group_field="person")


def test_a_hidden_name_needs_the_key_and_stays_the_same(tmp_path: Path) -> None:
    name_of = hidden_names(tmp_path / "audit" / KEY_FILE)
    assert name_of("Ann") == hidden_names(tmp_path / "audit" / KEY_FILE)("Ann") != name_of("Ben")
    assert name_of("Ann") != hidden_names(tmp_path / "other" / KEY_FILE)("Ann")
    assert name_of("Ann").startswith("group ")
    assert len(name_of("Ann")) == len("group 3f2a1c")
    assert (tmp_path / "audit" / KEY_FILE).stat().st_mode & 0o077 == 0


def test_groups_are_read_from_the_tables_of_documents(tmp_path: Path) -> None:
    data: Any = Prepared("person", train=["a", None, "b"], held_out=["c", "c"])
    shown = document_groups(AuditConfig(group_field="person", show_group_names=True), data, tmp_path)
    assert shown is not None
    assert (shown.members, shown.non_members) == ({0: "a", 2: "b"}, {0: "c", 1: "c"})
    assert shown.name_of("a") == "a"
    hidden = document_groups(SETTINGS, data, tmp_path)
    assert hidden is not None
    assert "a" not in hidden.name_of("a").removeprefix("group ").split()
    assert document_groups(AuditConfig(), data, tmp_path) is None


def test_data_without_these_groups_is_refused_with_the_next_step() -> None:
    without: Any = Prepared(None, train=names("a"), held_out=names("b"))
    check_groups(AuditConfig(), without, nothing)
    with pytest.raises(ConfigError, match=r"prepared was prepared without data\.group_field; prepare .* again"):
        check_groups(SETTINGS, without, nothing)
    other: Any = Prepared("author", train=names("a"), held_out=names("b"))
    with pytest.raises(ConfigError, match=r"'person', but .* with data\.group_field: author; use the same"):
        check_groups(SETTINGS, other, nothing)


def test_only_documents_that_are_audited_count() -> None:
    data: Any = Prepared("person", train=names("a"), held_out=names("b"))
    check_groups(SETTINGS, data, nothing)
    with pytest.raises(DataError, match=r"the members have 4 groups of 'person' with 2 documents or more"):
        check_groups(SETTINGS, data, lambda split: set(range(12)) if split == "train" else set())
    with pytest.raises(DataError, match=r"lower audit\.min_group_documents"):
        check_groups(AuditConfig(group_field="person", max_documents=2), data, nothing)
    both: Any = Prepared("person", train=names("a"), held_out=[*names("b"), "a 3"])
    with pytest.raises(DataError, match=r"1 groups of 'person' have documents among the members and"):
        check_groups(SETTINGS, both, nothing)


@pytest.mark.slow
def test_an_audit_by_groups_through_the_command_line(tmp_path: Path) -> None:
    source = tmp_path / "letters.jsonl"
    passages = islice(sotu_passages(), 300)
    rows = [{"text": text[:300], "person": f"Person {number // 4}"} for number, text in enumerate(passages)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dir": str(tmp_path / "prepared"),
        "source": str(source),
        "group_field": "person",
        "block_length": 64,
        "lanes": 8,
        "vocab_size": 512,
        "shares": {"train": 0.5, "reference": 0.1, "held_out": 0.4},
    }
    save_model(tmp_path / "model", 1)
    audit = {"models": {"one": str(tmp_path / "model")}, "bootstrap_resamples": 100, "permutations": 99}
    run = write_run(tmp_path / "run.yaml", data, audit={**audit, "group_field": "person"})
    succeed(dualtok("prepare", run))
    shown = succeed(dualtok("audit", run))
    assert "Groups of documents" in shown
    assert "Person" not in shown
    folder = run.with_suffix("")
    text = (folder / "audit" / "audit.json").read_text()
    assert "Person" not in text, "a name is personal data"
    groups = json.loads(text)["models"][0]["groups"]
    assert groups["field"] == "person"
    assert groups["member_groups"] + groups["non_member_groups"] + groups["small_member_groups"] <= 75
    assert groups["member_groups"] >= 20
    assert groups["worst"]["name"].startswith("group ")
    succeed(dualtok("report", run))
    with (folder / "report" / "report.csv").open(newline="") as stream:
        lines = {row["metric"]: row for row in csv.DictReader(stream)}
    assert float(lines["worst_group_p_value"]["value"]) == groups["worst"]["p_value"]
    assert groups["worst"]["name"] in lines["worst_group_auc_two_sided"]["note"]
    succeed(dualtok("audit", run, "audit.show_group_names=true"))
    assert '"name": "Person' in (folder / "audit" / "audit.json").read_text()
    assert "use the same" in error_line(dualtok("audit", run, "audit.group_field=author"))
