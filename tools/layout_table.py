"""When does a layout pay? Memory and communication per rank for some model sizes, as a Markdown table.

Computed from ``dualtok.plan``: nothing is built or run. Each row is the stage whose ranks hold most.

    python tools/layout_table.py [--ranks 16] [--stages 4] [--micro-batches 8] [--rows 1] [--length 2048]
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoConfig

from dualtok.plan.memory import Job, estimate_memory
from dualtok.plan.shape import ModelShape, read_shape
from dualtok.plan.traffic import step_traffic

# hidden, feed-forward, layers, heads, key-value heads, vocabulary; from 7B on those of Llama 2.
SHAPES = {
    "1.3B": (2048, 5504, 24, 32, 32, 32_000),
    "7B": (4096, 11_008, 32, 32, 32, 32_000),
    "13B": (5120, 13_824, 40, 40, 40, 32_000),
    "70B": (8192, 28_672, 80, 64, 8, 32_000),
}
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ZeRO-1", {"zero_stage": 1}),
    ("ZeRO-2", {"zero_stage": 2}),
    ("ZeRO-3", {"zero_stage": 3}),
    ("pipeline x ZeRO-1", {"engine": "pipeline", "zero_stage": 1}),
    ("sharded pipeline", {"engine": "sharded_pipeline", "zero_stage": 3}),
    ("sharded pipeline, kept", {"engine": "sharded_pipeline", "zero_stage": 3, "keep_gathered": True}),
)
GIB = 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"ranks": 16, "stages": 4, "micro-batches": 8, "rows": 1, "length": 2048}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(
        f"{options.ranks} ranks; pipelines of {options.stages} stages with {options.micro_batches} micro-batches of "
        f"{options.rows} x {options.length} tokens, without a pipeline as many tokens per step; bf16, activation "
        "checkpointing. GiB held per rank, and GiB sent per rank and step.\n"
    )
    print("| model | layout | model states | everything | gathered | reduced | passed on | sent in all |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name in SHAPES:
        shape = read_shape(configuration(name))
        for layout, settings in LAYOUTS:
            print(row(name, shape, layout, settings, options))


def configuration(name: str) -> Any:
    """Return the Llama configuration of a size."""
    hidden, feed_forward, layers, heads, key_value_heads, vocabulary = SHAPES[name]
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=False,
    )


def row(name: str, shape: ModelShape, layout: str, settings: dict[str, Any], options: argparse.Namespace) -> str:
    """Return a line of the table.

    A step has the same tokens in each layout: where all ranks are replicas, each has fewer micro-batches.
    """
    stages = options.stages if "engine" in settings else 1
    micro_batches = options.micro_batches if stages > 1 else max(1, options.micro_batches // options.stages)
    job = Job(
        ranks=options.ranks,
        stages=stages,
        rows=options.rows,
        length=options.length,
        micro_batches=micro_batches,
        activation_checkpointing=True,
        **settings,
    )
    memory = estimate_memory(shape, job)
    sent = step_traffic(shape, job, memory.stages.index(memory.largest))
    sizes = (
        f"{memory.largest.model_states.device / GIB:,.1f}",
        f"{memory.largest.total.device / GIB:,.1f}",
        *(f"{size / GIB:,.2f}" for size in (sent.gathered, sent.reduced, sent.passed, sent.total)),
    )
    return f"| {name} | {layout} | {' | '.join(sizes)} |"


if __name__ == "__main__":
    main()
