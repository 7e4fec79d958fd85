"""What the check of a machine measures with: sizes for a GPU, and smaller ones for a machine without."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """One set of sizes."""

    model: dict[str, int]
    """Llama configuration of the steps that are timed."""
    small: dict[str, int]
    """Llama configuration of the parity runs, and of the reference on host cores."""
    passages: int
    """Of the SOTU corpus."""
    block_length: int
    batch_size: int
    """Blocks per step."""
    precision: str
    head: tuple[int, int, int]
    """(tokens, hidden, vocabulary) of the output layer that the loss backends are timed on."""
    repeats: int
    """Steps, or passes of a head, that are timed after :data:`WARM_UP`."""
    matrix: int
    """Rows and columns of the matrix product that is timed."""


WARM_UP = 3

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

GPU = Sizes(
    # TinyLlama-1.1B's shape (its config.json)
    model={
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    small=SMALL,
    passages=2000,
    block_length=2048,
    batch_size=8,
    precision="bf16",
    head=(8192, 2304, 256000),  # Gemma 2 2B, on which cut-cross-entropy's authors published their figures
    repeats=10,
    matrix=8192,
)

CPU = Sizes(
    model={**SMALL, "vocab_size": 4096},
    small=SMALL,
    passages=150,
    block_length=128,
    batch_size=4,
    precision="fp32",
    head=(256, 64, 4096),
    repeats=3,
    matrix=512,
)


def sizes_here() -> Sizes:
    """Return the sizes for this machine."""
    return GPU if torch.cuda.is_available() else CPU
