"""How much of a bare forward pass's speed `dualtok score` keeps: tokens/s of both, in turns, in one process.

The bare pass is the same Hugging Face model's forward on the same blocks, already in memory, its logits dropped.
Scoring also reads the blocks, computes the losses and writes them, checksums and all.

    python tools/bench_score.py [--hidden 256] [--layers 4] [--block-length 256] [--batch-size 8] [--pairs 5]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmark_support import llama_config, paired, prepared_corpus, print_ratio, save_llama

from dualtok.commands.score.run import score
from dualtok.config.reference import ReferenceConfig
from dualtok.config.run import RunConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.model.load import load_causal_lm

SPLIT = "held_out"


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("block-length", 256), ("batch-size", 8), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_corpus(Path(folder), options.block_length)
        manifest = load_manifest(data.dir)
        model = save_llama(
            Path(folder) / "model",
            manifest.vocabulary,
            1,
            llama_config(options.hidden, options.layers, options.block_length),
        )
        reference = ReferenceConfig(model=str(model), splits=(SPLIT,), batch_size=options.batch_size)
        run = RunConfig(data=data, reference=reference)
        stream = DataFolder(data.dir).open(SPLIT)
        blocks = [
            stream.read_rows(shard.file, np.arange(first, min(first + options.batch_size, shard.rows)))
            for shard in manifest.splits[SPLIT].shards
            for first in range(0, shard.rows, options.batch_size)
        ]
        bare_model = load_causal_lm(model).eval()

        def scoring() -> float:
            shutil.rmtree(Path(data.dir) / "scores", ignore_errors=True)
            return score(run).tokens_per_second

        @torch.no_grad()
        def bare() -> float:
            started, tokens = time.perf_counter(), 0
            for block in blocks:
                bare_model(input_ids=block["input_ids"], position_ids=block["position_ids"], use_cache=False)
                tokens += block["input_ids"].numel()
            return tokens / (time.perf_counter() - started)

        scored, forward = paired(scoring, bare, options.pairs)
        print_ratio("dualtok score / bare forward pass", scored, forward, "tokens/s")


if __name__ == "__main__":
    main()
