"""How much of a bare forward pass's speed the audit's model pass keeps: tokens/s of both, in turns, in one process.

The bare pass is the same Hugging Face model's forward on the same blocks, already in memory, its logits dropped. The
audit's pass takes four signals of every token from the logits, the rank of the true token among them, and puts the
documents together again. The more ids a vocabulary has, the more there is to sum for each token; so there is a line for
each of several sizes. A second line has the highest resident memory of the process during one pass of each kind.
--processor-time counts the processors' seconds in place of those of the clock, for a machine that has other work.

    python tools/bench_audit.py [--hidden 384] [--layers 8] [--block-length 256] [--batch-size 8] [--blocks 16]
        [--pairs 7] [--vocabularies 8192 32000] [--processor-time]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from benchmark_support import llama_config, paired, prepared_corpus, print_ratio, save_llama

from dualtok.audit.signals.from_logits import token_signals
from dualtok.audit.signals.signals import SignalsBuilder
from dualtok.commands.audit.passes.model_signals import with_columns
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.distributed.forward_only import build_forward_only
from dualtok.distributed.ranks import join_ranks
from dualtok.model.load import load_causal_lm

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualtok.data.packing import Segment

    Blocks = list[tuple[dict[str, torch.Tensor], list[list[Segment]]]]

SPLIT = "train"


def main() -> None:
    """Measure and print the ratio for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 384),
        ("layers", 8),
        ("block-length", 256),
        ("batch-size", 8),
        ("blocks", 16),
        ("pairs", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--passages", type=int, help="of the corpus; all by default")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32000], help="ids of the models")
    parser.add_argument("--processor-time", action="store_true", help="count the processors' seconds")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_corpus(Path(folder), options.block_length, options.passages)
        ids = load_manifest(data.dir).vocabulary
        if min(options.vocabularies) < ids:
            parser.error(f"--vocabularies: the corpus has {ids} ids; give no fewer")
        batches = list(DataFolder(data.dir).open(SPLIT).sequential(options.batch_size, max_blocks=options.blocks))
        for vocabulary in options.vocabularies:
            config = llama_config(options.hidden, options.layers, options.block_length)
            model = save_llama(Path(folder) / f"model-{vocabulary}", vocabulary, 1, config)
            measure(model, batches, options.pairs, f"{vocabulary:,} ids", clock)


def measure(model: Path, batches: Blocks, pairs: int, label: str, clock: Callable[[], float]) -> None:
    """Time both passes of a model over the same batches and print their ratio."""
    tokens, rows = sum(batch["input_ids"].numel() for batch, _ in batches), len(batches[0][1])
    forward = build_forward_only(
        model, precision="fp32", batch_size=rows, deepspeed_json=None, ranks=join_ranks(), signals=token_signals
    )
    bare_model = load_causal_lm(model).eval()

    def audited() -> float:
        started, builder = clock(), SignalsBuilder()
        for batch, pieces in batches:
            builder.add(forward(batch), batch["labels"], [with_columns(row) for row in pieces])
        return tokens / (clock() - started)

    @torch.no_grad()
    def bare() -> float:
        started = clock()
        for batch, _ in batches:
            bare_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        return tokens / (clock() - started)

    audit, bare_pass = paired(audited, bare, pairs)
    parameters = sum(parameter.numel() for parameter in bare_model.parameters())
    print_ratio(
        f"{parameters / 1e6:.1f}M parameters, {label}: audit's pass / bare forward pass", audit, bare_pass, "tokens/s"
    )
    print_ratio(f"{label}: the same, memory", [peak_mib(audited)], [peak_mib(bare)], "MiB")


def peak_mib(run: Callable[[], float]) -> float:
    """Return the highest resident memory of this process while something runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
