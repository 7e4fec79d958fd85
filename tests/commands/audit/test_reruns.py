"""Attacks that run models again: each score is what the papers define, on any number of ranks, and is kept."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.attacks.registry import ATTACKS, names_of
from dualtok.audit.settings import AuditConfig, RerunSettings
from dualtok.audit.signals.reruns import RerunResult
from dualtok.audit.signals.signals import Signals
from dualtok.audit.statistics.evaluate import audit_model
from dualtok.commands.audit.passes.reruns import RerunResults, rerun_models
from dualtok.commands.report import write_run_report
from dualtok.config.data import DataConfig
from dualtok.config.load import load_run
from dualtok.data.folder import DataFolder
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.tokenizer import load_tokenizer
from dualtok.distributed.ranks import ALONE
from dualtok.errors import DataError
from tests.support import BLOCK_LENGTH, dualtok, partitioned_json, save_model, succeed, write_run

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig

NAMES = list(names_of("rerun"))
BUDGET = BLOCK_LENGTH // 2


def audit_yaml(data: dict[str, Any], folder: Path, name: str, **changes: Any) -> Path:
    model = folder / "model"
    if not model.is_dir():
        save_model(model, 3, initializer_range=0.3)  # so that predictions are far from uniform
    audit = {
        "models": {"one": str(model)},
        "attacks": ["loss", *NAMES],
        "max_documents": 12,
        "batch_size": 3,
        "fpr_targets": [0.2],
        "bootstrap_resamples": 100,
        "members": "train",
        "seed": 5,
        "reruns": {"prefix_documents": 2, "con_recall_gamma": 0.7, "neighbors": 4, "neighbor_share": 0.1},
        **changes,
    }
    return write_run(folder / f"{name}.yaml", {"dir": data["dir"]}, audit=audit)


@pytest.fixture(scope="module")
def audited(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RerunResults]:
    folder = tmp_path_factory.mktemp("reruns")
    run = load_run(audit_yaml(small_corpus, folder, "run"))
    return run, rerun_all(run, folder)


def rerun_all(run: RunConfig, kept: Path) -> RerunResults:
    models = {name: Path(path) for name, path in run.audit.models.items()}
    data = DataFolder.of_run(run.data)
    keys = dict.fromkeys(models, "model")
    return rerun_models(run.audit, data, models, ALONE, kept, keys=keys, left_out=lambda split: set())


def first_blocks(run: RunConfig, split: str) -> dict[int, np.ndarray]:
    """Return the first block of each document of more than one token, read shard by shard."""
    found = {}
    stream = DataFolder(run.data.dir).open(split)
    for batch, segments in stream.sequential(8):
        for ids, row in zip(batch["input_ids"].numpy(), segments, strict=True):
            column = 0
            for piece in row:
                if piece.start == 0 and piece.length > 1:
                    found[piece.doc] = ids[column : column + piece.length]
                column += piece.length
    return found


class Oracle:
    """transformers' own model, one document per call and nothing else in the row."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def log_p(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = self.model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy()
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))

    def losses(self, ids: np.ndarray) -> np.ndarray:
        return -self.log_p(ids)[np.arange(len(ids) - 1), ids[1:]]

    def gradient_norm(self, ids: np.ndarray) -> float:
        model = copy.deepcopy(self.model).double()
        tokens = torch.from_numpy(ids)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        return sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5


def scores(audited: tuple[RunConfig, RerunResults], attack: str, split: str) -> dict[int, float]:
    run, reruns = audited
    context = reruns.known("one", split, AttackContext(con_recall_gamma=run.audit.reruns.con_recall_gamma))
    documents = next(iter(context.reruns.values())).document
    ones = np.ones(len(documents), dtype=np.float32)
    target = Signals(documents, np.arange(len(documents) + 1), -ones, np.zeros(len(ones), np.int32), -ones, ones)
    return dict(zip(documents.tolist(), ATTACKS[attack](target, context).tolist(), strict=True))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_lowercase_and_gradient_norm_are_those_of_single_documents(
    audited: tuple[RunConfig, RerunResults], split: str
) -> None:
    run, _ = audited
    oracle, texts = Oracle(run.audit.models["one"]), first_blocks(run, split)
    lower, norms = scores(audited, "lowercase", split), scores(audited, "gradient_norm", split)
    assert len(lower) == 12
    for document, score in lower.items():
        ids = texts[document]
        assert len(ids) == BLOCK_LENGTH
        assert score == pytest.approx(lowercase_ratio(oracle, run, ids), rel=1e-5)
        assert norms[document] == pytest.approx(-oracle.gradient_norm(ids), rel=1e-4)


def lowercase_ratio(oracle: Oracle, run: RunConfig, ids: np.ndarray) -> float:
    tokenizer = load_tokenizer(Path(run.data.dir) / "tokenizer")
    whole = ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True).lower()
    again = np.array(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * int(whole))[:BLOCK_LENGTH]
    assert not np.array_equal(again, ids)
    return float(oracle.losses(again).mean() / oracle.losses(ids).mean())


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_recall_compares_the_same_tokens_with_and_without_a_prefix(
    audited: tuple[RunConfig, RerunResults], split: str
) -> None:
    run, reruns = audited
    oracle, end = Oracle(run.audit.models["one"]), load_tokenizer(Path(run.data.dir) / "tokenizer").eos_token_id
    texts = first_blocks(run, split)
    prefix = {}
    for side in ("train", "held_out"):
        blocks = first_blocks(run, side)
        assert 1 <= len(reruns.prefixes[side]) <= 2
        joined = np.concatenate([blocks[document] for document in reruns.prefixes[side]])
        prefix[side] = joined[joined != end][:BUDGET]
        assert len(prefix[side]) == BUDGET, "the corpus' documents are long enough"
    recall, contrast = scores(audited, "recall", split), scores(audited, "con_recall", split)
    for document, score in recall.items():
        head = texts[document][: BLOCK_LENGTH - BUDGET]
        plain = oracle.losses(head).sum()
        given = {side: oracle.losses(np.concatenate([p, head]))[len(p) :].sum() for side, p in prefix.items()}
        assert score == pytest.approx(given["held_out"] / plain, rel=1e-5)
        expected = (-given["held_out"] + 0.7 * given["train"]) / -plain
        assert contrast[document] == pytest.approx(expected, rel=1e-4)


def test_neighbors_hold_likely_other_tokens(audited: tuple[RunConfig, RerunResults]) -> None:
    run, _ = audited
    oracle, end = Oracle(run.audit.models["one"]), load_tokenizer(Path(run.data.dir) / "tokenizer").eos_token_id
    texts = first_blocks(run, "held_out")
    for document, score in scores(audited, "neighborhood", "held_out").items():
        ids = texts[document]
        log_p = oracle.log_p(ids)
        draw = np.random.default_rng([5, document])
        places = [place for place in range(1, len(ids)) if ids[place] != end]
        neighbors = []
        for _ in range(4):
            neighbor = ids.copy()
            for place in draw.choice(places, max(1, round(0.1 * len(places))), replace=False):
                p = np.exp(log_p[place - 1])
                p[[ids[place], end]] = 0
                likely = np.argsort(-p)[:10]
                neighbor[place] = draw.choice(likely, p=p[likely] / p[likely].sum())
            assert 0 < np.count_nonzero(neighbor != ids) <= 0.1 * len(ids) + 1
            neighbors.append(oracle.losses(neighbor).mean())
        assert score == pytest.approx(np.mean(neighbors) - oracle.losses(ids).mean(), rel=1e-4, abs=1e-5)


def test_kept_reruns_need_no_model_and_their_settings_name_them(
    audited: tuple[RunConfig, RerunResults], tmp_path: Path
) -> None:
    run, before = audited
    kept = Path(run.audit.models["one"]).parent
    gone = replace(run, audit=replace(run.audit, models={"one": str(tmp_path / "no such model")}))
    again = rerun_all(gone, kept)
    for which, results in before.results.items():
        assert results.keys() == {"lowercase", "non_member_prefix", "member_prefix", "neighbors", "gradient"}
        for name, result in results.items():
            for column, values in result.values.items():
                assert np.array_equal(again.results[which][name].values[column], values)
    only = replace(run.audit, attacks=("lowercase", "neighborhood"), reruns=RerunSettings(neighbors=2))
    files = set(kept.glob("*.npz"))
    assert len(files) == 2 * 5
    reruns = rerun_all(replace(run, audit=only), kept)
    assert {file.name.split("-", 1)[1] for file in set(kept.glob("*.npz")) - files} == {
        "neighbors-train.npz",
        "neighbors-held_out.npz",
    }
    assert reruns.prefixes == {}, "nothing is left out where nothing is put in front"


def test_results_of_before_0_2_are_taken_from_their_folder(
    audited: tuple[RunConfig, RerunResults], tmp_path: Path
) -> None:
    run, before = audited
    shutil.copytree(Path(run.audit.models["one"]).parent, tmp_path / "passes")
    gone = replace(run, audit=replace(run.audit, models={"one": str(tmp_path / "no such model")}))
    again = rerun_all(gone, tmp_path / "reruns")
    for which, results in before.results.items():
        for name, result in results.items():
            for column, values in result.values.items():
                assert np.array_equal(again.results[which][name].values[column], values)
    assert not (tmp_path / "reruns").exists()


def test_what_cannot_be_run_is_named_with_its_reason(audited: tuple[RunConfig, RerunResults], tmp_path: Path) -> None:
    run, _ = audited
    sharded = replace(
        run.audit, deepspeed=partitioned_json(tmp_path), attacks=("loss", "gradient_norm"), reruns=RerunSettings()
    )
    reruns = rerun_all(replace(run, audit=sharded), tmp_path)
    assert reruns.results == {}
    ones = np.ones(4, dtype=np.float32)
    target = Signals(np.arange(4), np.arange(5), -ones, np.zeros(len(ones), np.int32), -ones, ones)
    context = reruns.known("one", "train", AttackContext())
    row = audit_model("one", target, target, member_context=context, non_member_context=context, config=sharded)
    assert row.not_run == {"Grad norm": "needs the whole model on every rank, which audit.deepspeed shards"}
    assert [attack.name for attack in row.attacks] == ["loss"]


def test_documents_begin_once_where_the_tokenizer_begins_them(tmp_path: Path) -> None:
    """With a beginning token the prefix has the only one, and the document's first text token is judged, too."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from dualtok.data.tokenizer import train_tokenizer

    texts = [f"Sentence {i} is about the Number {i * i}, and Nothing else at all." * (1 + i % 9) for i in range(60)]
    plain = train_tokenizer(texts, 300)
    backend = plain.backend_tokenizer
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=plain.eos_token).save_pretrained(
        tmp_path / "tokenizer"
    )
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {
        "dir": str(tmp_path / "prepared"),
        "source": str(source),
        "block_length": BLOCK_LENGTH,
        "lanes": 1,
        "tokenizer": str(tmp_path / "tokenizer"),
        "processes": 1,
        "near_duplicate_threshold": None,
        "shares": {"train": 0.5, "held_out": 0.5},
    }
    prepare(DataConfig(**data), progress=False)
    run = load_run(audit_yaml(data, tmp_path, "run", attacks=["recall", "lowercase"], reruns={"prefix_documents": 2}))
    reruns = rerun_all(run, tmp_path)
    oracle, (bos, end) = Oracle(run.audit.models["one"]), (backend.token_to_id("<s>"), plain.eos_token_id)
    blocks = first_blocks(run, "held_out")
    joined = np.concatenate([blocks[document] for document in reruns.prefixes["held_out"]])
    prefix = np.concatenate([[bos], joined[(joined != end) & (joined != bos)]])[:BUDGET]
    for document, score in scores((run, reruns), "recall", "held_out").items():
        head = blocks[document][: BLOCK_LENGTH - BUDGET]
        assert head[0] == bos
        given = oracle.losses(np.concatenate([prefix, head[1:]]))[len(prefix) - 1 :]
        assert score == pytest.approx(given.mean() / oracle.losses(head).mean(), rel=1e-5)
    for document, score in scores((run, reruns), "lowercase", "held_out").items():
        assert score == pytest.approx(lowercase_ratio(oracle, run, blocks[document]), rel=1e-5)
    assert {ids[-1] == end for ids in blocks.values()} == {True, False}, "documents longer and shorter than a block"


def test_results_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    result = RerunResult(np.array([2, 5, 9]), {"loss": np.array([1.0, 2.0, 3.0])})
    assert result.of(np.array([9, 2]))["loss"].tolist() == [3.0, 1.0]
    for document in (1, 3, 10):
        with pytest.raises(DataError, match=f"1 documents are missing \\(e.g. document {document}\\)"):
            result.of(np.array([2, document]))
    with pytest.raises(DataError, match="loss of document 5 is not finite"):
        RerunResult(np.array([2, 5]), {"loss": np.array([1.0, np.nan])})
    file = tmp_path / "pass.npz"
    result.save(file)
    assert RerunResult.load(file).of(result.document)["loss"].tolist() == [1.0, 2.0, 3.0]
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="remove it and audit again"):
        RerunResult.load(file)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds_and_prefix_documents_are_not_evaluated(
    audited: tuple[RunConfig, RerunResults], small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    _, alone = audited
    shared = audit_yaml(small_corpus, tmp_path, "shared", deepspeed=partitioned_json(tmp_path))
    shown = succeed(dualtok("audit", shared, ranks=2))
    assert "Attacks that run the model again" in shown
    folder = shared.with_suffix("") / "audit"
    found = json.loads((folder / "audit.json").read_text())
    (model,) = found["models"]
    assert found["prefix_documents"] == alone.prefixes
    assert (model["n_members"], model["n_non_members"]) == tuple(12 - len(alone.prefixes[s]) for s in alone.prefixes)
    assert [attack["name"] for attack in model["attacks"]] == ["loss", *NAMES[:-1]]
    assert model["not_run"] == {"Grad norm": "needs the whole model on every rank, which audit.deepspeed shards"}
    page = write_run_report(load_run(shared)).read_text()
    assert all(label in page for label in ("ReCaLL", "after a prefix of non-members", "left out of held_out"))
    for (_, split), results in alone.results.items():
        for name, result in results.items():
            files = list((folder / "reruns").glob(f"*-{name}-{split}.npz"))
            assert len(files) == (name != "gradient")
            for file in files:
                theirs = RerunResult.load(file)
                assert np.array_equal(theirs.document, result.document)
                for column, values in result.values.items():
                    np.testing.assert_allclose(theirs.values[column], values, rtol=1e-4)


def test_settings_without_effect_are_refused() -> None:
    from pydantic import TypeAdapter, ValidationError

    def read(**settings: Any) -> AuditConfig:
        return TypeAdapter(AuditConfig).validate_python(settings)

    assert not set(NAMES) & set(AuditConfig().attacks), "they run the model again"
    assert read(attacks=["con_recall"], reruns={"con_recall_gamma": 0.1}).reruns.con_recall_gamma == 0.1
    with pytest.raises(ValidationError, match="con_recall_gamma: has no effect without con_recall"):
        read(attacks=["recall"], reruns={"con_recall_gamma": 0.1})
    with pytest.raises(ValidationError, match="neighbors: has no effect without neighborhood"):
        read(reruns={"neighbors": 3})
