"""Continuations by greedy decoding: a small model that learned its members by heart writes them, and no non-members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.signals import Signals
from dualtok.commands.audit.passes.continuations import choose_samples, continue_models
from dualtok.data.folder import DataFolder
from dualtok.distributed.ranks import ALONE
from dualtok.errors import ConfigError
from tests.commands.audit.conftest import short_corpus
from tests.support import dualtok, error_line, save_model, succeed, write_run

PREFIX, TOKENS = 8, 20
SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the section of a folder of short documents, each in one block."""
    folder = tmp_path_factory.mktemp("continuations")
    shares = {"train": 0.25, "reference": 0.3, "attack_reference": 0.1, "validation": 0.1, "held_out": 0.25}
    return short_corpus(folder, 100, shares)


def texts(data: dict[str, Any], split: str) -> dict[int, list[int]]:
    """The documents' first blocks, read from the shards."""
    found: dict[int, list[int]] = {}
    for batch, segments in DataFolder(data["dir"]).open(split).sequential(4):
        for ids, row in zip(batch["input_ids"].tolist(), segments, strict=True):
            column = 0
            for piece in row:
                if piece.start == 0:
                    found[piece.doc] = ids[column : column + piece.length]
                column += piece.length
    return found


@pytest.fixture(scope="module")
def learned(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny Llama on the members until it knows them, except for every third one."""
    folder = save_model(
        tmp_path_factory.mktemp("learned") / "model", 1, vocab_size=400, hidden_size=64, intermediate_size=128
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [ids for place, ids in enumerate(texts(data, "train").values()) if place % 3]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    # The folder's own way of decoding, which the audit must not follow.
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    return folder


def audit_yaml(data: dict[str, Any], learned: Path, path: Path, **changes: Any) -> Path:
    fresh = learned.parent / "fresh"
    if not fresh.is_dir():
        save_model(fresh, 4, vocab_size=400)
    audit = {
        "models": {"learned": str(learned), "fresh": str(fresh)},
        "attacks": ["loss"],
        "fpr_targets": [0.2],
        "bootstrap_resamples": 100,
        "batch_size": 5,
        "extract_tokens": TOKENS,
        **changes,
    }
    return write_run(path, {"dir": data["dir"]}, audit=audit)


def naive_common(one: list[int], other: list[int]) -> int:
    longest = 0
    for i in range(len(one)):
        for j in range(len(other)):
            length = 0
            while i + length < len(one) and j + length < len(other) and one[i + length] == other[j + length]:
                length += 1
            longest = max(longest, length)
    return longest


def oracle(folder: Path, ids: list[int]) -> tuple[int, int]:
    """Tokens from the start and in the longest common run, of a model that sees one document and has no cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    written = ids[:PREFIX]
    for _ in range(TOKENS):
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
    own, truth = written[PREFIX:], ids[PREFIX : PREFIX + TOKENS]
    verbatim = next((place for place in range(TOKENS) if own[place] != truth[place]), TOKENS)
    return verbatim, naive_common(own, truth)


def figures(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.with_suffix("") / "audit" / "audit.json").read_text())
    return {model["name"]: model for model in content["models"]}


@pytest.mark.slow
def test_members_learned_by_heart_come_back_and_ranks_tell_so_beforehand(
    data: dict[str, Any], learned: Path, tmp_path: Path
) -> None:
    run = audit_yaml(data, learned, tmp_path / "run.yaml", extract_prefix=PREFIX)
    shown = succeed(dualtok("audit", run, "--extract", "15"))
    assert "Regurgitation" in shown
    assert f"{TOKENS} after {PREFIX}" in shown
    kept = tmp_path / "run" / "audit"
    by_name = figures(run)
    for name, folder in (("learned", learned), ("fresh", learned.parent / "fresh")):
        found = by_name[name]["regurgitation"]["continuations"]
        for side, split in zip(("members", "non_members"), SPLITS, strict=True):
            documents = texts(data, split)
            assert len(found[side]) == 15
            for one in found[side][::3]:
                assert (one["verbatim"], one["common"]) == oracle(folder, documents[one["document"]])
            whole = sum(one["verbatim"] == TOKENS for one in found[side]) / 15
            assert found[f"whole_{side}"]["value"] == pytest.approx(whole)
            assert found[f"runs_{side}"]["largest"] == max(one["common"] for one in found[side])

    # What one forward pass over the true text says is what greedy decoding does, token for token.
    passes = [
        {split: Signals.load(str(file).replace("train", split)) for split in SPLITS}
        for file in (kept / "signals").glob("*-train.parquet")
    ]
    of_learned, of_fresh = sorted(passes, key=lambda own: own["train"].perplexity)
    for name, signals in (("learned", of_learned), ("fresh", of_fresh)):
        for side, split in zip(("members", "non_members"), SPLITS, strict=True):
            for one in by_name[name]["regurgitation"]["continuations"][side]:
                ranks = signals[split].select([one["document"]]).rank.tolist()[PREFIX - 1 : PREFIX - 1 + TOKENS]
                assert one["verbatim"] == next((place for place, rank in enumerate(ranks) if rank), TOKENS)

    own = by_name["learned"]["regurgitation"]
    assert own["continuations"]["whole_members"]["value"] > 0.4
    assert own["continuations"]["whole_non_members"]["value"] == 0
    assert own["extracted_members"]["low"] > own["extracted_non_members"]["high"]
    assert by_name["fresh"]["regurgitation"]["continuations"]["whole_members"]["value"] == 0


@pytest.mark.slow
def test_two_ranks_find_what_one_finds_and_results_are_kept(
    data: dict[str, Any], learned: Path, tmp_path: Path
) -> None:
    changes = {"extract": 7, "extract_prefix": PREFIX}
    one = audit_yaml(data, learned, tmp_path / "one.yaml", **changes)
    two = audit_yaml(data, learned, tmp_path / "two.yaml", **changes)
    succeed(dualtok("audit", one))
    succeed(dualtok("audit", two, ranks=2))
    assert figures(one)["learned"]["regurgitation"] == figures(two)["learned"]["regurgitation"]
    files = sorted((tmp_path / "one" / "audit" / "continuations").glob("*.npz"))
    assert len(files) == 4, "two models, members and non-members"
    times = [file.stat().st_mtime_ns for file in files]
    succeed(dualtok("audit", one, "audit.confidence=0.9"))
    assert [file.stat().st_mtime_ns for file in files] == times, "a model wrote again"


def test_the_sample_is_long_enough_and_drawn_from_what_is_audited(data: dict[str, Any]) -> None:
    folder = DataFolder(data["dir"])
    settings = AuditConfig(extract=9, extract_prefix=PREFIX, extract_tokens=TOKENS, max_documents=15, seed=3)
    out = set(list(texts(data, "train"))[:5])
    samples = choose_samples(settings, folder, lambda split: out if split == "train" else set())
    assert {split: len(own) for split, own in samples.items()} == dict.fromkeys(SPLITS, 9)
    assert not out & set(samples["train"].tolist())
    for split in SPLITS:
        lengths = {document: len(ids) for document, ids in texts(data, split).items()}
        assert min(lengths[document] for document in samples[split].tolist()) >= PREFIX + TOKENS
    assert choose_samples(AuditConfig(), folder, lambda split: set()) == {}
    assert continue_models({}, settings, folder, {}, ranks=ALONE, kept=Path("none"), keys={}) == {}


def test_what_cannot_be_continued_is_said(data: dict[str, Any], learned: Path, tmp_path: Path) -> None:
    folder = DataFolder(data["dir"])
    with pytest.raises(ConfigError, match=r"audit\.extract_prefix \+ audit\.extract_tokens: 50 \+ 50 .*blocks of 64"):
        choose_samples(AuditConfig(extract=3), folder, lambda split: set())
    one = min(texts(data, "train"), key=lambda document: len(texts(data, "train")[document]))
    with pytest.raises(ConfigError, match="more than any document of 'train' has"):
        choose_samples(AuditConfig(extract=3, extract_tokens=14), folder, lambda split: set(texts(data, split)) - {one})
    run = audit_yaml(data, learned, tmp_path / "run.yaml", extract=3, deepspeed="z3.json")
    assert "audit.extract: greedy decoding needs the whole model" in error_line(dualtok("audit", run))
    run = audit_yaml(data, learned, tmp_path / "idle.yaml", extract_prefix=9)
    assert "audit.extract_prefix: has no effect without audit.extract" in error_line(dualtok("audit", run))
