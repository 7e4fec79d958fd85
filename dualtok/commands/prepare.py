"""The part of ``dualtok prepare`` that needs a model: text sampled at a high temperature, as canaries.

Mitchell et al. 2026 (arXiv 2606.10481) sample canaries from a language model at temperatures of .8 and more: they look
like documents and yet no model predicts them well, so that one that learned them is easily told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dualtok.data.prepare.canaries import uniform
from dualtok.data.tokenizer import read_tokenizer
from dualtok.errors import ConfigError, DataError
from dualtok.model.load import load_causal_lm
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dualtok.config.canaries import CanaryConfig

ROWS = 16
"""Canaries that are sampled together."""


def sample_texts(config: CanaryConfig) -> list[str]:
    """Sample the texts of canaries of the kind ``high_temperature``, on host cores.

    The random numbers are keyed hashes of the seed, the canary and the step, so that the same model gives the same
    texts on the same machine. Special tokens are never sampled: each text has ``config.tokens`` tokens of the model.

    Args:
        config: model, temperature, tokens, prompt, count and seed.

    Raises:
        ConfigError: the model or its tokenizer cannot be read, the context is too short, or sampling has nothing to
            begin with.
    """
    assert config.model is not None
    assert config.tokens is not None
    model = load_causal_lm(config.model).eval()
    try:
        tokenizer = read_tokenizer(config.model)
    except DataError as error:
        raise ConfigError(f"data.canaries.model: {error}") from None
    beginning = _beginning(config, tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(beginning) + config.tokens > context:
        raise ConfigError(
            f"data.canaries.tokens: {config.tokens}, and {len(beginning)} of the prompt, exceed the {context} "
            f"positions of {config.model}; lower it"
        )
    texts: list[str] = []
    with RunProgress("prepare: canaries sampled", config.count) as bar:
        for first in range(0, config.count, ROWS):
            numbers = range(first, min(first + ROWS, config.count))
            rows = _sample(config, model, tokenizer, beginning, numbers)
            texts += [str(tokenizer.decode(ids)).strip() for ids in rows.tolist()]
            bar.advance(len(numbers))
    return texts


def _beginning(config: CanaryConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the model continues: its begin or end token, and the prompt."""
    head = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prompt = tokenizer(config.prompt or "", add_special_tokens=False)["input_ids"]
    beginning = [*([] if head is None else [head]), *prompt]
    if not beginning:
        raise ConfigError(
            f"data.canaries.prompt: the tokenizer of {config.model} has no token that begins a text; give a prompt"
        )
    return beginning


@torch.no_grad()
def _sample(
    config: CanaryConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginning: list[int],
    numbers: range,
) -> torch.Tensor:
    """Sample the token ids of some canaries [canary, config.tokens]."""
    never = sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})
    known = len(tokenizer)
    inputs = torch.tensor([beginning] * len(numbers))
    past, steps = None, []
    for step in range(config.tokens or 0):
        output = model(input_ids=inputs, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[:, -1].double()
        logits[:, [token for token in never if token < logits.shape[1]]] = -torch.inf
        logits[:, known:] = -torch.inf  # rows of the embedding that no token has
        ends = (logits / config.temperature).softmax(-1).cumsum(-1)
        drawn = torch.tensor([[uniform(config, number, step)] for number in numbers], dtype=torch.float64)
        inputs = torch.searchsorted(ends, drawn * ends[:, -1:], right=True)
        steps.append(inputs)
    return torch.cat(steps, dim=1)
