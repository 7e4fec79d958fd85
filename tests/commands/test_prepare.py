"""Text that a model samples as canaries, against greedy decoding and the model's own probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dualtok.commands.prepare import sample_texts
from dualtok.config.canaries import CanaryConfig
from dualtok.data.tokenizer import save_tokenizer, train_tokenizer
from dualtok.errors import ConfigError
from tests.support import save_model

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of spread probabilities with more rows than its tokenizer has ids."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, 4, vocab_size=VOCABULARY + 20, initializer_range=0.4)
    tokenizer = train_tokenizer(["some words to learn, and some more words to learn"] * 9, VOCABULARY)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    return folder


def ready(model: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(model).eval(), PreTrainedTokenizerFast.from_pretrained(model)


def probabilities(model: Path, ids: list[int], temperature: float) -> torch.Tensor:
    """Return the next token's distribution over ids that may be sampled."""
    network, tokenizer = ready(model)
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids])).logits[0, -1].double()
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[: len(tokenizer)] = True
    allowed[tokenizer.all_special_ids] = False
    return torch.where(allowed, logits / temperature, -torch.inf).softmax(-1)


def test_a_low_temperature_is_greedy_decoding(model: Path) -> None:
    config = CanaryConfig(
        count=2, kind="high_temperature", model=str(model), temperature=1e-6, tokens=6, prompt="some words"
    )
    tokenizer = ready(model)[1]
    ids = [tokenizer.eos_token_id, *tokenizer("some words")["input_ids"]]
    start = len(ids)
    for _ in range(6):
        ids.append(int(probabilities(model, ids, 1.0).argmax()))
    assert sample_texts(config) == [tokenizer.decode(ids[start:]).strip()] * 2


def test_tokens_come_with_the_models_probabilities_at_the_temperature(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[list[int]] = []
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "decode", lambda _self, ids, **_more: str(decoded.append(list(ids)) or len(decoded))
    )
    config = CanaryConfig(count=600, kind="high_temperature", model=str(model), temperature=1.7, tokens=2, seed=1)
    sample_texts(config)
    tokenizer = ready(model)[1]
    expected = probabilities(model, [tokenizer.eos_token_id], 1.7).numpy()
    first = np.bincount([ids[0] for ids in decoded], minlength=len(expected))
    likely = expected * 600 > 8
    observed = [*first[likely], first[~likely].sum()]
    assert scipy.stats.chisquare(observed, [*(expected[likely] * 600), expected[~likely].sum() * 600]).pvalue > 0.001
    assert not first[expected == 0].any()


def test_the_seed_fixes_texts_and_a_larger_number_leaves_the_first_alone(model: Path) -> None:
    settings = {"kind": "high_temperature", "model": str(model), "tokens": 8}
    texts = sample_texts(CanaryConfig(count=20, seed=3, **settings))
    assert len(set(texts)) == 20
    assert sample_texts(CanaryConfig(count=17, seed=3, **settings)) == texts[:17]
    assert not set(sample_texts(CanaryConfig(count=20, seed=4, **settings))) & set(texts)


def test_what_cannot_sample_is_refused_by_its_key(model: Path, tmp_path: Path) -> None:
    def sample(**changes: object) -> None:
        sample_texts(CanaryConfig(**{"count": 2, "kind": "high_temperature", "model": str(model), **changes}))

    with pytest.raises(ConfigError, match=r"data\.canaries\.tokens: 100000"):
        sample(tokens=100_000)
    bare = save_model(tmp_path / "bare", 2, vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match=r"data\.canaries\.model: .*not a tokenizer"):
        sample(model=str(bare))
    with pytest.raises(ConfigError, match="nowhere"):
        sample(model=str(tmp_path / "nowhere"))
