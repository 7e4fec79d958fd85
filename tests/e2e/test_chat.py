"""Conversations through every verb: scored, selected, learned, evaluated and attacked by their trained tokens alone.

The oracle knows nothing of blocks: it renders each conversation with plain transformers, runs the model over each piece
by itself, and takes the losses of the answers' tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from dualtok.audit.signals.signals import Signals
from dualtok.config.load import load_run
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.stream.poisson import PoissonDocuments
from dualtok.data.tokenizer import load_tokenizer
from dualtok.reference.fingerprint import reference_fingerprint
from dualtok.reference.stored import StoredLosses
from tests.chat_support import CHATML_MARKED, chat_rows, write_chat_corpus, write_rows
from tests.data.chat.test_masks import by_prefixes
from tests.support import (
    dualtok,
    error_line,
    history,
    partitioned_json,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    write_run,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS, BATCH, SEED = 240, 8, 5
WIDE = 0.25
"""Standard deviation of the weights, as in tests/multi_rank/test_layout_parity.py: scores lie far apart."""
CHANGES = {"num_hidden_layers": 4, "tie_word_embeddings": False, "initializer_range": WIDE}
TRAIN = {
    "learning_rate": 1e-3,
    "batch_size": BATCH,
    "steps": 6,
    "warmup_steps": 2,
    "gradient_clipping": 0.05,
    "epsilon": 1e-6,
    "precision": "fp32",
    "evaluation_blocks": 8,
    "evaluate_every": 3,
}


class Chat(NamedTuple):
    """Prepared conversations and two models: the one to train and the reference."""

    section: dict[str, Any]
    start: Path
    reference: Path
    folder: Path


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("chat")
    section = write_chat_corpus(folder, rows=ROWS)
    changes = {**CHANGES, "max_position_embeddings": 256}
    start, reference = (save_model(folder / name, seed, **changes) for name, seed in (("start", 3), ("reference", 7)))
    for model in (start, reference):
        load_tokenizer(section["tokenizer"]).save_pretrained(model)
    return Chat(section, start, reference, folder)


@pytest.fixture(scope="module")
def masks(chat: Chat) -> dict[int, tuple[list[int], list[int]]]:
    """Return each conversation's ids and mask, by plain transformers."""
    tokenizer = load_tokenizer(chat.section["tokenizer"])
    return {number: by_prefixes(tokenizer, row) for number, row in enumerate(chat_rows(ROWS))}


def piece_losses(
    model: Path, documents: dict[int, tuple[list[int], list[int]]], block_length: int
) -> dict[tuple[int, int], NDArray[np.float64]]:
    """Return (document, start of a piece) -> the losses of its trained tokens, by plain transformers and torch."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(model).eval()
    found = {}
    for document, (ids, mask) in documents.items():
        for start in range(0, len(ids), block_length):
            piece = torch.tensor(ids[start : start + block_length])
            on = np.array(mask[start + 1 : start + block_length], dtype=bool)
            with torch.no_grad():
                logits = causal_lm(input_ids=piece[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits.double(), piece[1:], reduction="none")
            found[document, start] = losses.numpy()[on]
    return found


@pytest.fixture(scope="module")
def oracle(chat: Chat, masks: dict[int, tuple[list[int], list[int]]]) -> dict[str, dict[Any, NDArray[np.float64]]]:
    length = chat.section["block_length"]
    return {model.name: piece_losses(model, masks, length) for model in (chat.start, chat.reference)}


def run_file(chat: Chat, name: str, **changes: Any) -> Path:
    sections: dict[str, Any] = {
        "seed": SEED,
        "objective": "dual",
        "model": {"path": str(chat.start)},
        "reference": {"model": str(chat.reference)},
        "train": TRAIN,
        **changes,
    }
    return write_run(chat.folder / f"{name}.yaml", {"dir": chat.section["dir"]}, **sections)


@pytest.fixture(scope="module")
def scored(chat: Chat) -> Path:
    run = run_file(chat, "plain")
    succeed(dualtok("score", run))
    succeed(dualtok("train", run))
    return run


def first_batch(chat: Chat) -> list[tuple[int, int]]:
    """Return (document, start) of each piece of the first step's blocks."""
    stream = DataFolder(chat.section["dir"]).open("train", seed=SEED)
    places = [stream.locate(sample)[1:] for sample in range(BATCH)]
    return [(s.doc, s.start) for file, row in places for s in stream.pieces(file, np.array([row]))[0]]


def test_the_reference_scores_answers_alone(
    chat: Chat, scored: Path, oracle: dict[str, dict[Any, NDArray[np.float64]]]
) -> None:
    data = DataFolder(chat.section["dir"])
    run = load_run(scored)
    assert run.reference is not None
    stored = StoredLosses(data, "train", reference_fingerprint(run.reference, data.manifest))
    stream = data.open("train")
    compared = 0
    for file, rows in stream.shards():
        losses = stored.read(Path(file).stem, np.arange(rows))
        for row, pieces in enumerate(stream.pieces(file, np.arange(rows))):
            column = 0
            for document, start, length in pieces:
                own = losses[row, column : column + length]
                expected = oracle["reference"][document, start]
                np.testing.assert_allclose(own[own != 0], expected, rtol=1e-5, atol=1e-5)
                compared += len(expected)
                column += length
    assert compared == data.entry("train").predicted_tokens > 0


def test_selection_and_dual_loss_are_of_trained_tokens(
    chat: Chat, scored: Path, oracle: dict[str, dict[Any, NDArray[np.float64]]]
) -> None:
    pieces = first_batch(chat)
    loss, reference = (np.concatenate([oracle[name][piece] for piece in pieces]) for name in ("start", "reference"))
    order = np.argsort(loss - reference)
    hard, memorized = order[len(order) - int(0.6 * len(order)) :], order[: int(0.2 * len(order))]
    memorized = memorized[(loss - reference)[memorized] < 0]
    first = history(scored)[0]
    assert (first["hard_tokens"], first["memorized_tokens"]) == (len(hard), len(memorized))
    assert first["hard_loss"] == pytest.approx(loss[hard].mean(), rel=1e-5)
    assert first["memorized_loss"] == pytest.approx(loss[memorized].mean(), rel=1e-5)
    assert first["plain_loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert first["loss"] == pytest.approx(loss[hard].mean() - 0.8 * loss[memorized].mean(), rel=1e-5)


def test_the_plain_loss_and_evaluations_are_of_trained_tokens(
    chat: Chat, oracle: dict[str, dict[Any, NDArray[np.float64]]]
) -> None:
    changes = {
        **TRAIN,
        "steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-12,
        "evaluate_every": 1,
        "evaluation_blocks": 1000,
    }
    run = run_file(chat, "causal", objective="causal_lm", reference=None, train=changes)
    succeed(dualtok("train", run))
    start = oracle["start"]
    expected = np.concatenate([start[piece] for piece in first_batch(chat)]).mean()
    assert history(run)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    data = DataFolder(chat.section["dir"])
    held = set(data.documents("validation")["doc"].to_pylist())
    validation = np.concatenate([losses for (document, _), losses in start.items() if document in held]).mean()
    assert history(run, "evaluations.jsonl")[-1]["validation_loss"] == pytest.approx(validation, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["two ranks of ZeRO-3", "pipeline", "sharded pipeline", "live reference"])
def test_every_layout_trains_as_one_process(chat: Chat, scored: Path, tmp_path: Path, layout: str) -> None:
    plain = tmp_path / "stage0.json"
    plain.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    zero3 = {"deepspeed": partitioned_json(tmp_path)}
    staged = {"pipeline": {"stages": 2}, "deepspeed": str(plain)}
    train, reference = {
        "two ranks of ZeRO-3": (zero3, {}),
        "pipeline": ({"engine": "pipeline", **staged}, {}),
        "sharded pipeline": ({"engine": "sharded_pipeline", **staged, **zero3}, {}),
        "live reference": (zero3, {"mode": "offload"}),
    }[layout]
    run = run_file(
        chat, layout.replace(" ", "-"), reference={"model": str(chat.reference), **reference}, train={**TRAIN, **train}
    )
    succeed(dualtok("train", run, ranks=2))
    one, two = history(scored), history(run)
    assert len(one) == len(two) == TRAIN["steps"]
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "hard_loss", "memorized_loss", "plain_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (layout, name)
        for name in ("hard_tokens", "memorized_tokens"):
            assert ours[name] == theirs[name] > 0, (layout, name)
    validation = [[row["validation_loss"] for row in history(path, "evaluations.jsonl")] for path in (scored, run)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_learns_what_an_uninterrupted_one_learns(chat: Chat, scored: Path, tmp_path: Path) -> None:
    halves = run_file(chat, "halves", train={**TRAIN, "checkpoint_every": 2, "checkpoint_keep": 3})
    succeed(dualtok("train", halves))
    *earlier, last = sorted((halves.with_suffix("") / "checkpoints").glob("step-*"))
    assert earlier
    shutil.rmtree(last)
    again = dualtok("train", halves, "--resume")
    succeed(again)
    assert "step 6: validation" in again.stderr
    assert "step 3: validation" not in again.stderr
    for run, name in ((scored, "one"), (halves, "two")):
        succeed(dualtok("export", run.with_suffix(""), tmp_path / name, "--checkpoint", "latest"))
    assert relative_distance(read_weights(tmp_path / "one"), read_weights(tmp_path / "two")) < 1e-6
    assert load_tokenizer(tmp_path / "one").chat_template == load_tokenizer(chat.section["tokenizer"]).chat_template


def document_losses(oracle: dict[Any, NDArray[np.float64]], documents: set[int]) -> dict[int, NDArray[np.float64]]:
    found: dict[int, list[NDArray[np.float64]]] = {}
    for (document, _), losses in sorted(oracle.items()):
        if document in documents:
            found.setdefault(document, []).append(losses)
    return {document: np.concatenate(parts) for document, parts in found.items()}


@pytest.mark.slow
def test_an_audit_looks_at_the_trained_tokens_of_each_conversation(
    chat: Chat, oracle: dict[str, dict[Any, NDArray[np.float64]]]
) -> None:
    audit = {
        "models": {"start": str(chat.start)},
        "attack_reference": str(chat.reference),
        "attacks": ["loss", "ref", "zlib", "min_k", "dc_pdd", "recall"],
        "bootstrap_resamples": 100,
    }
    run = write_run(chat.folder / "audit.yaml", {"dir": chat.section["dir"]}, audit=audit)
    succeed(dualtok("audit", run))
    figures = json.loads((run.with_suffix("") / "audit" / "audit.json").read_text())
    (model,) = figures["models"]
    assert [attack["name"] for attack in model["attacks"]] == ["loss", "ref", "zlib", "min_k", "dc_pdd"]
    (reason,) = model["not_run"].values()
    assert reason == "needs documents of which all tokens are trained, and of conversations not all are"
    data = DataFolder(chat.section["dir"])
    found = {
        frozenset(signals.document.tolist()): signals
        for file in (run.with_suffix("") / "audit" / "signals").glob("*.parquet")
        if (signals := Signals.load(file)).log_prob.size
        and math.isclose(-signals.log_prob[0], _first(oracle["start"], int(signals.document[0])), rel_tol=1e-4)
    }
    for split in ("train", "held_out"):
        documents = set(data.documents(split)["doc"].to_pylist())
        expected = document_losses(oracle["start"], documents)
        signals = found[frozenset(documents)]
        assert signals.document.tolist() == sorted(expected)
        own = np.split(-signals.log_prob.astype(np.float64), signals.offsets[1:-1])
        for losses, document in zip(own, sorted(expected), strict=True):
            np.testing.assert_allclose(losses, expected[document], rtol=1e-5, atol=1e-5)


def _first(oracle: dict[Any, NDArray[np.float64]], document: int) -> float:
    starts = sorted(start for own, start in oracle if own == document)
    return float(np.concatenate([oracle[document, start] for start in starts])[0])


@pytest.mark.slow
def test_raw_files_of_conversations_are_audited_with_the_models_own_template(
    chat: Chat, masks: dict[int, tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    rows = chat_rows(60)
    files = [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in (("m", rows[:30]), ("n", rows[30:]))]
    succeed(
        dualtok(
            "audit", "--model", chat.start, "--members", files[0], "--non-members", files[1], "--out", tmp_path / "out"
        )
    )
    losses = piece_losses(chat.start, {number: masks[number] for number in range(60)}, 256)
    found = sorted(tmp_path.rglob("signals/*.parquet"))
    assert len(found) == 2
    for file in found:
        signals = Signals.load(file)
        own = np.split(-signals.log_prob.astype(np.float64), signals.offsets[1:-1])
        for document, values in zip(signals.document.tolist(), own, strict=True):
            parts = [own for (number, _), own in sorted(losses.items()) if number == document]
            np.testing.assert_allclose(values, np.concatenate(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dp_sgd_learns_the_trained_tokens_of_each_drawn_conversation(
    chat: Chat, oracle: dict[str, dict[Any, NDArray[np.float64]]]
) -> None:
    pytest.importorskip("opacus")
    train = {**TRAIN, "engine": "opacus", "steps": 2, "warmup_steps": 0, "learning_rate": 1e-12, "evaluate_every": 2}
    del train["gradient_clipping"]
    privacy = {"epsilon": 8.0, "delta": 1e-5}
    run = run_file(chat, "private", objective="causal_lm", reference=None, train=train, privacy=privacy)
    succeed(dualtok("train", run))
    stream = DataFolder(chat.section["dir"]).open("train", seed=SEED)
    documents = sorted(DataFolder(chat.section["dir"]).documents("train")["doc"].to_pylist())
    drawn = PoissonDocuments(stream, batch_size=BATCH, parts=1, seed=SEED)
    for step, row in enumerate(history(run)):
        mine = [documents[number] for number in drawn.drawn(step, 0, 1)]
        expected = np.concatenate([oracle["start"][document, 0] for document in mine]).mean()
        assert row["plain_loss"] == pytest.approx(expected, rel=1e-4)


def test_continuations_of_conversations_are_refused(chat: Chat) -> None:
    audit = {"models": {"start": str(chat.start)}, "extract": 2, "extract_prefix": 4, "extract_tokens": 4}
    run = write_run(chat.folder / "extract.yaml", {"dir": chat.section["dir"]}, audit=audit)
    assert "audit.extract: continues texts, and these data are conversations" in error_line(dualtok("audit", run))


def test_the_command_prepares_and_says_what_is_trained(chat: Chat, tmp_path: Path) -> None:
    shares = {"train": 0.6, "held_out": 0.4}
    data = {**chat.section, "dir": str(tmp_path / "prepared"), "train_on": "last", "shares": shares}
    (tmp_path / "marked.jinja").write_text(CHATML_MARKED)
    run = write_run(tmp_path / "run.yaml", {**data, "chat_template": str(tmp_path / "marked.jinja")})
    assert f"{ROWS} documents are conversations (data.train_on: last)" in succeed(dualtok("prepare", run))
    manifest = load_manifest(tmp_path / "prepared")
    assert manifest.chat is not None
    assert manifest.chat.train_on == "last"


def test_raw_files_that_cannot_be_read_as_conversations_are_named(chat: Chat, tmp_path: Path) -> None:
    texts, chats = [{**row, "text": "a"} for row in chat_rows(4)], chat_rows(4)
    bare = tmp_path / "model"
    shutil.copytree(chat.start, bare)
    (bare / "chat_template.jinja").unlink()

    def refused(rows: list[dict[str, Any]]) -> str:
        one, other = (write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("one", "other"))
        lists = ("--members", one, "--non-members", other, "--out", tmp_path / "out")
        return error_line(dualtok("audit", "--model", bare, *lists))

    both = "one.jsonl:1: holds both a field 'text' and a conversation; give a file that has one of them"
    assert both in refused(texts)
    found = refused(chats)
    assert "one.jsonl:1: a conversation, but the tokenizer has no chat template" in found
    assert "an audit takes the template that is saved with the model's tokenizer" in found
