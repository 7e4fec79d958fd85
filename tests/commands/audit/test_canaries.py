"""Canaries end to end: a small model that learned the included ones by heart, and one that was never trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dualtok.data.manifest import load_manifest
from dualtok.data.prepare.canaries import Canary, canary_config, candidates, load_canaries
from dualtok.data.tokenizer import encode, load_tokenizer
from tests.commands.audit.conftest import short_corpus
from tests.support import dualtok, partitioned_json, save_model, succeed, tiny_llama_config, write_run

COUNT = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the section of a folder with few and short documents and 120 canaries."""
    folder = tmp_path_factory.mktemp("canaries")
    shares = {"train": 0.2, "reference": 0.3, "attack_reference": 0.1, "validation": 0.1, "held_out": 0.3}
    return short_corpus(folder, 140, shares, canaries={"count": COUNT, "length": 4, "seed": 3})


def losses(model: Any, rows: list[list[int]]) -> list[float]:
    """Return the sum of -log p over each text's tokens after the first, from a pass over that text alone."""
    found = []
    for ids in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        found.append(float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")))
    return found


def extracted(model: Any, tokenizer: Any, canary: Canary) -> bool:
    """Return whether greedy decoding after the prefix gives the secret's text."""
    prefix = encode(tokenizer, [canary.prefix])[0][:-1]
    wanted = len(encode(tokenizer, [canary.text])[0]) - 1 - len(prefix)
    ids = list(prefix)
    for _ in range(wanted):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return bool(tokenizer.decode(ids) == canary.text)


def read_figures(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "audit" / "audit.json").read_text())
    return figures


def assert_alike(figures: dict[str, Any], others: dict[str, Any]) -> None:
    """Two audits find the same exposures and extract the same canaries."""
    for one, other in zip(figures["models"], others["models"], strict=True):
        assert one["name"] == other["name"]
        for kind in ("included", "excluded"):
            found, again = one["canaries"], other["canaries"]
            assert found["ranked"][kind] == pytest.approx(again["ranked"][kind], abs=0.1)
            assert found[f"extracted_{kind}"]["value"] == again[f"extracted_{kind}"]["value"]


@pytest.mark.slow
def test_what_was_learned_by_heart_is_found_and_an_untrained_model_gives_nothing_away(
    data: dict[str, Any], tmp_path: Path
) -> None:
    model = {"config": tiny_llama_config(hidden_size=64, intermediate_size=128, vocab_size=400)}
    train = {"precision": "fp32", "learning_rate": 5e-3, "batch_size": 16, "steps": 300, "evaluate_every": 1000}
    run = write_run(tmp_path / "plain.yaml", data, objective="causal_lm", model=model, train=train)
    succeed(dualtok("train", run))
    succeed(dualtok("export", tmp_path / "plain", tmp_path / "learned", "--checkpoint", "latest"))
    models = {"learned": str(tmp_path / "learned"), "fresh": str(save_model(tmp_path / "fresh", 4, vocab_size=400))}
    audit = {
        "models": models,
        "attack_reference": str(save_model(tmp_path / "other", 2, vocab_size=400)),
        "fpr_targets": [0.2],
        "bootstrap_resamples": 200,
        "canary_candidates": 60,
        "batch_size": 23,
    }
    audited = write_run(tmp_path / "audit.yaml", {"dir": data["dir"]}, audit=audit)
    shown = succeed(dualtok("audit", audited, ranks=2))
    assert "Canaries" in shown
    figures = read_figures(tmp_path / "audit")
    by_name = {row["name"]: row for row in figures["models"]}
    learned, fresh = by_name["learned"]["canaries"], by_name["fresh"]["canaries"]

    assert min(score["auc"]["value"] for score in learned["scores"]) > 0.97
    assert [bound["epsilon"] > 1.5 for bound in learned["epsilon"]] == [True, True]
    assert np.median(learned["extrapolated"]["included"]) > 3 > np.median(learned["extrapolated"]["excluded"])
    for score in fresh["scores"]:
        assert score["auc"]["low"] < 0.5 < score["auc"]["high"]
    assert [bound["epsilon"] for bound in fresh["epsilon"]] == [0, 0]
    for side in ("included", "excluded"):
        assert 0.5 < np.median(fresh["ranked"][side]) < 2
        assert fresh[f"extracted_{side}"]["value"] == 0

    manifest = load_manifest(data["dir"])
    canaries, settings = load_canaries(data["dir"], manifest), canary_config(manifest)
    assert manifest.canaries is not None
    members = manifest.splits["train"].documents - manifest.canaries.included
    assert [row["n_members"] for row in figures["models"]] == [members] * 2, "canaries are no members"

    sharded = write_run(
        tmp_path / "sharded.yaml",
        {"dir": data["dir"]},
        audit={**audit, "attacks": ["loss"], "deepspeed": partitioned_json(tmp_path)},
    )
    succeed(dualtok("audit", sharded, ranks=2))
    assert_alike(figures, read_figures(tmp_path / "sharded"))

    tokenizer = load_tokenizer(Path(data["dir"]) / "tokenizer")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "learned").eval()
    hits = [extracted(direct, tokenizer, canary) for canary in canaries]
    for side, kind in ((True, "included"), (False, "excluded")):
        mine = [canary for canary in canaries if canary.included == side]
        share = np.mean([hit for hit, canary in zip(hits, canaries, strict=True) if canary.included == side])
        assert learned[f"extracted_{kind}"]["value"] == pytest.approx(share)
        for place in (0, 7, 21):
            others = [f"{mine[place].prefix} {secret}" for secret in candidates(mine[place], settings, 60)]
            own, *rest = losses(direct, encode(tokenizer, [mine[place].text, *others]))
            exposure = math.log2(61) - math.log2(1 + sum(loss <= own for loss in rest))
            assert learned["ranked"][kind][place] == pytest.approx(exposure)
    assert sum(hits) > 0

    succeed(dualtok("report", audited))
    page = (tmp_path / "audit" / "report" / "report.html").read_text()
    assert "<h2>Canaries</h2>" in page


@pytest.mark.slow
def test_canaries_stay_out_of_the_members_that_shadow_models_judge(data: dict[str, Any], tmp_path: Path) -> None:
    audit = {
        "models": {"fresh": str(save_model(tmp_path / "fresh", 4, vocab_size=400))},
        "attacks": ["loss"],
        "shadows": 2,
        "shadow_checkpoint": "latest",
        "bootstrap_resamples": 100,
        "canary_candidates": 60,
        "fpr_targets": [0.2],
    }
    train = {"precision": "fp32", "learning_rate": 1e-3, "batch_size": 16, "steps": 2}
    model = {"config": tiny_llama_config(vocab_size=400)}
    run = write_run(tmp_path / "run.yaml", data, objective="causal_lm", model=model, train=train, audit=audit)
    succeed(dualtok("audit", run))
    [row] = read_figures(tmp_path / "run")["models"]
    manifest = load_manifest(data["dir"])
    assert manifest.canaries is not None
    assert row["n_members"] == manifest.splits["train"].documents - manifest.canaries.included
    assert {attack["name"] for attack in row["attacks"]} == {"loss", "lira", "lira_offline"}
    kinds = ("included", "excluded")
    assert [len(row["canaries"]["ranked"][kind]) for kind in kinds] == [
        manifest.canaries.included,
        COUNT - manifest.canaries.included,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new_tokens", "high_temperature"])
def test_canaries_without_drawn_secrets_are_told_and_have_no_exposure(
    data: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    tokenizer = Path(data["dir"]) / "tokenizer"
    canaries: dict[str, Any] = {"count": 40, "kind": kind, "seed": 3}
    if kind == "high_temperature":
        sampling = save_model(tmp_path / "sampling", 6, vocab_size=400)
        for path in tokenizer.iterdir():
            (sampling / path.name).write_bytes(path.read_bytes())
        canaries |= {"model": str(sampling), "tokens": 12}
    section = {**data, "dir": str(tmp_path / "prepared"), "canaries": canaries}
    model = {"config": tiny_llama_config(hidden_size=64, intermediate_size=128, vocab_size=400)}
    train = {"precision": "fp32", "learning_rate": 5e-3, "batch_size": 16, "steps": 150, "evaluate_every": 1000}
    run = write_run(tmp_path / "plain.yaml", section, objective="causal_lm", model=model, train=train)
    assert "of 40 are in train" in succeed(dualtok("prepare", run))
    succeed(dualtok("train", run))
    succeed(dualtok("export", tmp_path / "plain", tmp_path / "learned", "--checkpoint", "latest"))
    audit = {
        "models": {"learned": str(tmp_path / "learned")},
        "attacks": ["loss"],
        "fpr_targets": [0.2],
        "bootstrap_resamples": 100,
    }
    audited = write_run(tmp_path / "audit.yaml", {"dir": section["dir"]}, audit=audit)
    shown = succeed(dualtok("audit", audited))
    assert "Lower bounds on epsilon, by method" in shown
    [row] = read_figures(tmp_path / "audit")["models"]
    found = row["canaries"]
    assert found["kind"] == kind
    assert found["scores"][0]["auc"]["value"] > 0.9
    assert [bound["method"] for bound in found["other_bounds"]] == [
        "f_dp",
        "f_dp",
        "f_dp_gaussian",
        "independent_gaussian",
    ]
    assert (found["candidates"], found["space_bits"]) == (0, 0)
    assert found["ranked"] == found["extrapolated"] == {"included": [], "excluded": []}
    assert (found["extracted_included"] is None) == (kind == "high_temperature")

    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "learned").eval()
    made = load_canaries(section["dir"], load_manifest(section["dir"]))
    ids = encode(load_tokenizer(tokenizer), [canary.text for canary in made])
    scores = [-loss / (len(row) - 1) for loss, row in zip(losses(direct, ids), ids, strict=True)]
    if kind == "new_tokens":  # the token alone: what it adds to the loss of what is before it
        whole, before = losses(direct, [row[:-1] for row in ids]), losses(direct, [row[:-2] for row in ids])
        scores = [b - a for a, b in zip(whole, before, strict=True)]
    coins = np.array([canary.included for canary in made])
    auc = np.mean(np.array(scores)[coins][:, None] > np.array(scores)[~coins])
    assert found["scores"][0]["auc"]["value"] == pytest.approx(auc, abs=0.002)
    succeed(dualtok("report", audited))
    assert "<h2>Canaries</h2>" in (tmp_path / "audit" / "report" / "report.html").read_text()
