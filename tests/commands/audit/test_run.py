"""The audit as a job: the same figures on any number of ranks, its signals kept, its report beside its settings."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dualtok.audit.attacks.registry import names_of
from dualtok.audit.settings import AuditConfig
from dualtok.data.manifest import load_manifest
from dualtok.reference.fingerprint import blocks_digest, weights_digest
from dualtok.versions import code_digest
from tests.support import dualtok, error_line, partitioned_json, save_model, succeed, write_run


def audit_run(small_corpus: dict[str, Any], folder: Path, name: str, **changes: Any) -> Path:
    models = {seed: str(folder / f"model-{seed}") for seed in (1, 2)}
    for seed, path in models.items():
        if not Path(path).is_dir():
            save_model(Path(path), seed)
    audit = {
        "models": {"one": models[1]},
        "attack_reference": models[2],
        "fpr_targets": [0.2],
        "bootstrap_resamples": 100,
        "batch_size": 3,
        **changes,
    }
    return write_run(folder / f"{name}.yaml", {"dir": small_corpus["dir"]}, audit=audit)


def figures(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.with_suffix("") / "audit" / "audit.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_find_what_one_finds(small_corpus: dict[str, Any], tmp_path: Path, sharded: bool) -> None:
    alone = audit_run(small_corpus, tmp_path, "alone", null_model="one")
    changes = {"deepspeed": partitioned_json(tmp_path)} if sharded else {}
    shared = audit_run(small_corpus, tmp_path, "shared", null_model="one", **changes)
    shown = succeed(dualtok("audit", alone))
    assert "held-out" in shown
    assert "strongest" in shown
    succeed(dualtok("audit", shared, ranks=2))
    (one,), (two,) = figures(alone)["models"], figures(shared)["models"]
    assert one["perplexity_non_members"] == pytest.approx(two["perplexity_non_members"], rel=1e-6)
    assert one["loss_gap"] == pytest.approx(two["loss_gap"], rel=1e-4, abs=1e-6)
    assert [attack["name"] for attack in one["attacks"]] == list(AuditConfig().attacks)
    for first, second in zip(one["attacks"], two["attacks"], strict=True):
        # A tree may split elsewhere for the last digit of a feature.
        close = 2e-3 if first["name"] in names_of("single_pass", "joint") else 0.05
        assert first["auc"]["value"] == pytest.approx(second["auc"]["value"], abs=close)
    assert "Attacks that know the defence" in shown
    checks, theirs = figures(alone)["checks"], figures(shared)["checks"]
    null, null_of_two = checks.pop("null_model"), theirs.pop("null_model")
    assert checks == theirs
    for found in (null, null_of_two):  # its weights were drawn, so that it has seen nothing
        assert found["name"] == "one"
        assert found["strongest"]["auc_two_sided"]["low"] == 0.5
        assert found["p_value"] > 0.05
    assert 0 <= checks["shared_passages"] < 0.1
    assert checks["blind_auc"]["low"] <= 0.5 <= checks["blind_auc"]["high"]
    assert checks["warnings"] == []


@pytest.mark.slow
def test_signals_are_kept_and_the_report_has_the_settings_of_its_figures(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    run = audit_run(small_corpus, tmp_path, "run", max_documents=20)
    assert "run `dualtok audit` first" in error_line(dualtok("report", run))
    succeed(dualtok("audit", run))
    signals = sorted((run.with_suffix("") / "audit" / "signals").glob("*.parquet"))
    assert len(signals) == 4, "two models, members and non-members"
    times = [file.stat().st_mtime_ns for file in signals]
    succeed(dualtok("audit", run, "audit.fpr_targets=[0.4]"))
    assert [file.stat().st_mtime_ns for file in signals] == times, "a model was run again"
    assert figures(run)["models"][0]["n_members"] == 20
    # The run's file says 0.2; the figures were last measured at 0.4.
    succeed(dualtok("report", run))
    report = run.with_suffix("") / "report"
    written = json.loads((report / "report.json").read_text())
    assert written["settings"]["fpr_targets"] == [0.4]
    hashes = written["hashes"]
    assert set(hashes) == {"data", "code", "model one", "attacker's reference"}
    assert hashes["code"] == code_digest()
    assert hashes["data"] == blocks_digest(load_manifest(written["identity"]["data"]))
    assert hashes["model one"] == weights_digest(written["settings"]["models"]["one"]) != hashes["attacker's reference"]
    assert all(digest in (report / "report.html").read_text() for digest in hashes.values())
    with (report / "report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["model"] for row in rows} == {"one", ""}, "the model, and the audit's own checks"
    assert [row["metric"] for row in rows if not row["model"]] == ["blind_auc", "duplicates", "shared_passages"]
    assert "<html" in (report / "report.html").read_text()
    assert "none above its limit" in succeed(dualtok("gate", run.with_suffix(""), "--max-strongest-auc", "1"))
    assert json.loads((report / "report.json").read_text())["gate"]["verdict"] == "passed"
    succeed(dualtok("audit", run, "audit.fpr_targets=[0.3]"))
    stale = dualtok("gate", run.with_suffix(""), "--max-strongest-auc", "1")
    assert "run `dualtok report` again" in error_line(stale)
