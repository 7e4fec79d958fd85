"""DP-SGD: every document's gradient by itself, as autograd gives it; clipped, added up, and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dualtok.config.model import ModelConfig
from dualtok.config.privacy import PrivacyConfig
from dualtok.config.train import TrainConfig
from dualtok.data.folder import DataFolder
from dualtok.data.stream.poisson import PoissonDocuments
from dualtok.distributed.layout import build_layout
from dualtok.distributed.ranks import ALONE
from dualtok.errors import ConfigError
from dualtok.model.norms import row_norms
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.loss import CausalLM
from dualtok.train.engines import dp_sgd as private
from dualtok.train.engines.build import build_engine
from dualtok.train.engines.dp_account import PrivacyAccount, slowness, stated
from dualtok.train.engines.dp_sgd import PrivateEngine
from tests.support import tiny_llama_config

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY, LENGTH = 64, 16
MODELS: dict[str, dict[str, Any]] = {
    "llama": tiny_llama_config(),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": LENGTH,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
Document = dict[str, torch.Tensor]


def saved(folder: Path, kind: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**MODELS[kind], "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    return folder / kind


def engine(folder: Path, kind: str, *, noise: float = 0.0, clip: float = 0.5, batch_size: int = 5) -> PrivateEngine:
    account = PrivacyAccount(noise, 0.1, 10, 1e-5, clip, "rdp", 50, 0, False)
    train = TrainConfig(
        learning_rate=0.1,
        batch_size=batch_size,
        steps=10,
        precision="fp32",
        engine="opacus",
        schedule="constant",
        weight_decay=0.0,
    )
    made = build_engine(
        saved(folder, kind),
        ModelConfig(path="x"),
        train,
        config={},
        objective=CausalLM(),
        total_steps=10,
        layout=build_layout(ALONE),
        account=account,
    )
    assert isinstance(made, PrivateEngine)
    return made


def batch(n: int, seed: int = 0) -> Document:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (n, LENGTH), generator=draw)
    labels = ids.roll(-1, 1)
    for row, length in enumerate(torch.randint(2, LENGTH, (n,), generator=draw).tolist()):
        labels[row, length - 1 :] = IGNORED_LABEL
    return {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(n, 1), "labels": labels}


def gradients(made: PrivateEngine, documents: Document) -> list[list[torch.Tensor]]:
    """Return each document's gradient of its mean token loss, by plain autograd, one document at a time."""
    made.hooks.disable_hooks()
    parameters = made.optimizer.params
    found = []
    for row in range(len(documents["input_ids"])):
        one = {name: tensor[row : row + 1] for name, tensor in documents.items()}
        loss = made.model(one).sum() / (one["labels"] != IGNORED_LABEL).sum()
        found.append(list(torch.autograd.grad(loss, parameters)))
    made.hooks.enable_hooks()
    return found


def clipped_mean(each: list[list[torch.Tensor]], clip: float, expected: int) -> list[torch.Tensor]:
    factors = [min(1.0, clip / float(torch.stack([g.norm() for g in one]).norm())) for one in each]
    assert len({factor == 1.0 for factor in factors}) == 2, "some documents must be clipped, and some not"
    return [sum(f * g for f, g in zip(factors, column, strict=True)) / expected for column in zip(*each, strict=True)]  # type: ignore[misc]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_follows_the_clipped_gradients_of_single_documents(tmp_path: Path, kind: str, parts: int) -> None:
    documents = batch(7)
    probe = gradients(engine(tmp_path, kind), documents)
    norms = sorted(float(torch.stack([g.norm() for g in one]).norm()) for one in probe)
    clip = (norms[2] + norms[3]) / 2
    made = engine(tmp_path, kind, clip=clip)
    expected = clipped_mean(gradients(made, documents), clip, expected=5)
    seen: list[torch.Tensor] = []
    made.optimizer.original_optimizer.step = lambda: seen.extend(p.grad.clone() for p in made.optimizer.params)
    cuts = np.array_split(np.arange(7), parts)
    outcomes = made.train_step([{name: tensor[rows] for name, tensor in documents.items()} for rows in cuts])
    assert len(seen) == len(expected)
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert sum(outcome.weights.counts.tokens for outcome in outcomes) == int(
        (documents["labels"] != IGNORED_LABEL).sum()
    )


def test_an_empty_draw_is_a_step_of_noise_alone(tmp_path: Path) -> None:
    made = engine(tmp_path, "llama", noise=2.0, clip=0.5)
    seen: list[torch.Tensor] = []
    parameters = made.optimizer.params
    made.optimizer.original_optimizer.step = lambda: seen.extend(p.grad.flatten().clone() for p in parameters)
    made.train_step([{name: tensor[:0] for name, tensor in batch(1).items()}])
    noise = torch.cat(seen)
    # Deviation: noise multiplier x clipping norm / expected documents; five deviations of an estimate from so many.
    expected = 2.0 * 0.5 / 5
    assert abs(float(noise.std()) / expected - 1) < 5 / (2 * len(noise)) ** 0.5
    assert made.engine.global_steps == 1


def test_noise_follows_the_seed_and_the_step(tmp_path: Path) -> None:
    empty = [{name: tensor[:0] for name, tensor in batch(1).items()}]
    taken = []
    for _ in range(2):
        made = engine(tmp_path, "llama", noise=1.0)
        seen: list[torch.Tensor] = []
        first = made.optimizer.params[0]
        made.optimizer.original_optimizer.step = lambda seen=seen, first=first: seen.append(first.grad.clone())
        made.train_step(empty)
        made.train_step(empty)
        taken.append(seen)
    assert torch.equal(taken[0][0], taken[1][0])
    assert torch.equal(taken[0][1], taken[1][1])
    assert not torch.equal(taken[0][0], taken[0][1])


def test_the_head_has_a_weight_of_its_own(tmp_path: Path) -> None:
    made = engine(tmp_path, "llama")
    names = dict(made.model.causal_lm.named_parameters())
    assert torch.equal(names["lm_head.weight"], names["model.embed_tokens.weight"])
    assert names["lm_head.weight"] is not names["model.embed_tokens.weight"]


def test_documents_are_clipped_by_norms_that_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer without a rule of its own, as GPT-2's are, by our norm of each document's gradient."""
    taken: list[int] = []

    def spy(rows: torch.Tensor) -> torch.Tensor:
        taken.append(rows[0].numel())
        return row_norms(rows)

    made = engine(tmp_path, "gpt2")
    monkeypatch.setattr(private, "row_norms", spy)
    made.train_step([batch(3)])
    assert max(taken) == 4 * 32 * 32, "the matrices of the feed-forward network"


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_opacus_own(accountant: Any) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    privacy = PrivacyConfig(noise_multiplier=1.1, delta=1e-5, accountant=accountant)
    account = PrivacyAccount.plan(privacy, rate=0.04, steps=50, documents=400, truncated=3)
    theirs = {"prv": PRVAccountant, "rdp": RDPAccountant}[accountant]()
    for _ in range(50):
        theirs.step(noise_multiplier=1.1, sample_rate=0.04)
    assert account.epsilon(50) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
    assert account.epsilon(0) == 0.0
    assert 0 < account.epsilon(10) < account.epsilon(50)


def test_a_long_search_for_the_noise_is_announced() -> None:
    note = slowness(PrivacyConfig(epsilon=1000.0))
    assert note is not None
    assert "takes minutes, and gigabytes, to find the noise for 1000; privacy.accountant=rdp" in note
    quick = (PrivacyConfig(epsilon=1000.0, accountant="rdp"), PrivacyConfig(noise_multiplier=0.1))
    assert [slowness(privacy) for privacy in (*quick, PrivacyConfig(epsilon=100.0))] == [None] * 3


@pytest.mark.parametrize(("accountant", "epsilon"), [("prv", 1e-4), ("rdp", 1e-4), ("rdp", 0.01)])
def test_a_target_out_of_the_accountants_reach_is_named(accountant: Any, epsilon: float) -> None:
    privacy = PrivacyConfig(epsilon=epsilon, accountant=accountant)
    with pytest.raises(
        ConfigError, match=rf"privacy\.epsilon: the accountant '{accountant}' finds no noise for {epsilon:g}"
    ):
        PrivacyAccount.plan(privacy, rate=0.04, steps=100, documents=400, truncated=0)


def test_the_noise_reaches_the_target(tmp_path: Path) -> None:
    account = PrivacyAccount.plan(PrivacyConfig(epsilon=8.0), rate=0.04, steps=100, documents=400, truncated=0)
    assert 7.9 < account.epsilon(100) <= 8.0
    account.write(tmp_path, 40)
    assert '"steps_done": 40' in (tmp_path / "privacy.json").read_text()
    assert str(stated(tmp_path)).startswith(
        f"({account.epsilon(40):.3g}, 1e-05)-DP per document after 40 steps, against"
    )
    assert stated(tmp_path / "elsewhere") is None
    with pytest.raises(ValueError, match="exactly one of"):
        PrivacyConfig(epsilon=8.0, noise_multiplier=1.0)


def test_documents_are_drawn_independently_whatever_the_ranks(small_corpus: dict[str, Any]) -> None:
    stream = DataFolder(small_corpus["dir"]).open("train")
    documents = PoissonDocuments(stream, batch_size=16, parts=1, seed=3)
    n, steps = len(documents), 400
    for world in (1, 2):
        taken = np.zeros(n)
        sizes = []
        for step in range(steps):
            drawn = np.concatenate([documents.drawn(step, rank, world) for rank in range(world)])
            assert len(set(drawn)) == len(drawn)
            taken[drawn] += 1
            sizes.append(len(drawn))
        rate = documents.rate
        # Binomial: the sizes of draws, and how often each document was drawn.
        assert abs(np.mean(sizes) - 16) < 5 * (n * rate * (1 - rate) / steps) ** 0.5
        assert 0.7 < np.var(sizes) / (n * rate * (1 - rate)) < 1.4
        assert np.abs(taken - steps * rate).max() < 5 * (steps * rate * (1 - rate)) ** 0.5
    assert set(documents.drawn(7, 0, 2)) | set(documents.drawn(7, 1, 2)) == set(documents.drawn(7, 0, 1))


def test_a_sample_is_the_first_piece_of_one_document(small_corpus: dict[str, Any]) -> None:
    data = DataFolder(small_corpus["dir"])
    stream, table = data.open("train"), data.documents("train")
    documents = PoissonDocuments(stream, batch_size=16, parts=2, seed=3)
    lengths = dict(zip(table["doc"].to_pylist(), table["n_tokens"].to_pylist(), strict=True))
    assert len(documents) == len(lengths)
    assert documents.truncated == sum(length > stream.block_length for length in lengths.values())
    rows = documents.read(np.arange(len(documents)))
    for row, document in enumerate(sorted(lengths)):
        expected = min(lengths[document], stream.block_length) - 1
        assert int((rows["labels"][row] != IGNORED_LABEL).sum()) == expected
    batches = documents.batches(32, 8)
    parts = [next(batches), next(batches)]
    assert sum(len(part["input_ids"]) for part in parts) == len(documents.drawn(2, 0, 1))
