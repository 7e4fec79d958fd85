"""Configurations of well-known models, so that a run can be planned before anything is downloaded.

Sizes are those of the models' published ``config.json``; what is not named here is transformers' default.
"""

from __future__ import annotations

from typing import Any


def _llama(sizes: tuple[int, int, int, int, int], vocabulary: int, positions: int) -> dict[str, Any]:
    """Return a Llama's configuration; sizes are hidden, feed-forward, layers, heads, key-value heads."""
    hidden, feed_forward, layers, heads, key_value_heads = sizes
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }


def _neox(hidden: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


NAMED: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
    },
    "EleutherAI/pythia-160m": _neox(768, 12, 12, 50_304),
    "EleutherAI/pythia-1.4b": _neox(2048, 24, 16, 50_304),
    "EleutherAI/pythia-6.9b": _neox(4096, 32, 32, 50_432),
    "meta-llama/Llama-2-7b-hf": _llama((4096, 11_008, 32, 32, 32), 32_000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama((5120, 13_824, 40, 40, 40), 32_000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama((8192, 28_672, 80, 64, 8), 32_000, 4096),
    "meta-llama/Meta-Llama-3-8B": _llama((4096, 14_336, 32, 32, 8), 128_256, 8192),
    "meta-llama/Meta-Llama-3-70B": _llama((8192, 28_672, 80, 64, 8), 128_256, 8192),
    "meta-llama/Llama-3.1-8B": _llama((4096, 14_336, 32, 32, 8), 128_256, 131_072),
    "meta-llama/Llama-3.1-70B": _llama((8192, 28_672, 80, 64, 8), 128_256, 131_072),
    "meta-llama/Llama-3.1-405B": _llama((16_384, 53_248, 126, 128, 8), 128_256, 131_072),
}
"""Hub name -> configuration, as ``model.config`` takes it."""


def named(path: str) -> dict[str, Any] | None:
    """Return the configuration of a hub name, or of a local folder that will hold it (its last part); None if unknown.

    ``models/Llama-2-7b-hf`` is ``meta-llama/Llama-2-7b-hf``.
    """
    last = path.rstrip("/").rpartition("/")[2].lower()
    return next((config for name, config in NAMED.items() if name.rpartition("/")[2].lower() == last), None)
