"""Which tokens a dual run learns and unlearns at each of its checkpoints, and the cosine of the two gradients.

    python tools/paper/dynamics.py runs/paper/sotu-0/dynamics_dual.yaml

The same blocks of the training split are judged by every checkpoint, with the run's own selection and reference. Writes
``dynamics.json`` into the run's folder: shares of hard and memorized tokens, the share of tokens hard at the first
checkpoint that are memorized now, and cos(grad of mean CE over T_h, grad of mean CE over T_m) over the batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from dualtok.commands.export import export
from dualtok.commands.train import open_streams
from dualtok.config.load import load_run
from dualtok.data.manifest import load_manifest
from dualtok.data.mixed import load_sources
from dualtok.distributed.ranks import ALONE
from dualtok.files import write_text
from dualtok.model.load import load_causal_lm
from dualtok.objective.head import IGNORED_LABEL
from dualtok.objective.loss import build_objective

BLOCKS = 64


def judge(model: Any, objective: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the masks of hard and memorized tokens of every batch, and the cosines of the two gradients."""
    hard, memorized, cosines = [], [], []
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(batch["labels"].shape)
        outcome = objective(losses, batch)
        hard.append(outcome.weights.hard)
        memorized.append(outcome.weights.memorized)
        if outcome.weights.hard.any() and outcome.weights.memorized.any():
            learned, unlearned = (
                torch.autograd.grad(losses[mask].mean(), parameters, retain_graph=True)
                for mask in (outcome.weights.hard, outcome.weights.memorized)
            )
            pairs = [
                torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
                for a, b in zip(learned, unlearned, strict=True)
            ]
            product, one, other = torch.stack(pairs).sum(0).tolist()
            cosines.append(product / (one * other) ** 0.5)
    return {"hard": torch.cat(hard), "memorized": torch.cat(memorized), "cosines": cosines}


def main() -> None:
    """Judge the tokens by every checkpoint of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="file of a finished run with stored reference losses")
    run = load_run(parser.parse_args().run)
    folder = Path(run.output_dir)
    assert run.train is not None
    load_manifest(run.data.dir)
    (stream,) = open_streams(run, load_sources(run.data, run.train.split), (run.train.split,), ALONE)
    batches = [batch for batch, _ in stream.sequential(run.train.batch_size, max_blocks=BLOCKS)]
    tokens = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches)
    objective = build_objective(run.loss, run.selection, run.goldfish)
    entries: list[dict[str, Any]] = []
    first: torch.Tensor | None = None
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        with tempfile.TemporaryDirectory() as scratch:
            export(folder, Path(scratch) / "model", which=checkpoint.name, precision="fp32", merge=False)
            model = load_causal_lm(Path(scratch) / "model", attention="sdpa", trust_remote_code=False).eval()
        judged = judge(model, objective, batches)
        first = judged["hard"] if first is None else first
        cosines = judged["cosines"]
        entries.append(
            {
                "step": int(checkpoint.name.removeprefix("step-")),
                "hard": int(judged["hard"].sum()) / tokens,
                "memorized": int(judged["memorized"].sum()) / tokens,
                "hard_to_memorized": int((first & judged["memorized"]).sum()) / max(1, int(first.sum())),
                "cosine": statistics.fmean(cosines) if cosines else None,
                "cosine_deviation": statistics.pstdev(cosines) if cosines else None,
            }
        )
    write_text(folder / "dynamics.json", json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
