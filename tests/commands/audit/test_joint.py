"""The pass of a model and the attacker's reference together, with real models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.files import Ragged, read_ragged, write_ragged
from dualtok.audit.signals.signals import Signals
from dualtok.commands.audit.passes.joint import KL, KL_DTYPES, joint_forward, read_divergences
from dualtok.data.folder import DataFolder
from dualtok.distributed.ranks import Ranks
from tests.commands.audit.test_run import audit_run, figures
from tests.support import dualtok, error_line, partitioned_json, save_model, succeed

if TYPE_CHECKING:
    from pathlib import Path


def test_divergences_are_those_of_the_models_own_logits(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    folders = [save_model(tmp_path / str(seed), seed) for seed in (1, 2)]
    batch, _ = next(iter(DataFolder(small_corpus["dir"]).open("held_out").sequential(3)))
    forward = joint_forward(folders[0], folders[1], AuditConfig(), Ranks(0, 1, torch.device("cpu")))
    found = forward(batch)[KL].numpy()
    with torch.no_grad():
        q, p = (
            torch.softmax(
                AutoModelForCausalLM.from_pretrained(folder)(
                    input_ids=batch["input_ids"], position_ids=batch["position_ids"]
                ).logits.double(),
                dim=-1,
            ).numpy()
            for folder in folders
        )
    expected = np.where(batch["labels"].numpy() != -100, (p * np.log(p / q)).sum(-1), 0.0)
    assert expected.max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


def test_divergences_are_read_by_document(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    write_ragged(tmp_path / "kl.parquet", Ragged(np.array([7, 3, 9]), np.array([0, 2, 2, 5]), {KL: values}))
    found = read_divergences(tmp_path / "kl.parquet")
    assert {document: own.tolist() for document, own in found.items()} == {7: [0.0, 1.0], 3: [], 9: [2.0, 3.0, 4.0]}


@pytest.mark.slow
def test_info_rmia_is_run_on_demand_and_its_pass_is_kept(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    run = audit_run(small_corpus, tmp_path, "run", max_documents=20, attacks=["ref", "info_rmia"])
    assert "InfoRMIA" in succeed(dualtok("audit", run, ranks=2))
    folder = run.with_suffix("") / "audit" / "signals"
    (of_members,) = folder.glob("*-*-train.parquet")
    model_key, reference_key, _ = of_members.stem.split("-")
    target, reference = (Signals.load(folder / f"{key}-train.parquet") for key in (model_key, reference_key))
    (kl,) = read_ragged(of_members, KL_DTYPES)
    np.testing.assert_array_equal(kl.document, target.document)
    np.testing.assert_array_equal(kl.offsets, target.offsets)
    assert (kl.values[KL] > 0).all()
    before = of_members.stat().st_mtime_ns
    succeed(dualtok("audit", run, "audit.fpr_targets=[0.4]"))
    assert of_members.stat().st_mtime_ns == before, "both models were run again"
    assert [attack["name"] for attack in figures(run)["models"][0]["attacks"]] == ["ref", "info_rmia"]
    assert reference.n_documents == target.n_documents == 20

    layouts: dict[str, dict[str, Any]] = {
        "sharded": {"deepspeed": partitioned_json(tmp_path)},
        "half": {"precision": "bf16"},
    }
    aucs = {}
    for name, layout in layouts.items():
        other = audit_run(small_corpus, tmp_path, name, max_documents=20, attacks=["ref", "info_rmia"], **layout)
        succeed(dualtok("audit", other, ranks=2))
        aucs[name] = [attack["auc"]["value"] for attack in figures(other)["models"][0]["attacks"]]
    whole = [attack["auc"]["value"] for attack in figures(run)["models"][0]["attacks"]]
    assert aucs["sharded"] == pytest.approx(whole, abs=1 / 400), "one of 20 x 20 pairs may change places"
    assert aucs["half"] == pytest.approx(whole, abs=0.1)

    wider = audit_run(
        small_corpus,
        tmp_path,
        "wider",
        attacks=["info_rmia"],
        models={"wide": str(save_model(tmp_path / "wide", 3, vocab_size=600))},
    )
    assert "'wide' has 600 logits and the attacker's reference 512" in error_line(dualtok("audit", wider))
