"""Every layout trains the same model: one matrix of engines, ZeRO stages, ranks, accumulation and scopes.

Each cell trains some steps with clipping active and all three sets (learned, unlearned, neutral) non-empty, every
replica reading other blocks, and must equal one process of ZeRO-0 with the same scope, accumulation and global
micro-batch. The cells of one number of ranks share a launch. ``make test-parity`` trains all of them for 12 steps,
``make test`` those marked ``ci`` for 6.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dualtok.commands.export import export
from tests.multi_rank.train_cells import REFUSED_FILE, SELECTION_FILE
from tests.support import (
    ROOT,
    command,
    dualtok,
    environment,
    read_weights,
    relative_distance,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
    write_small_corpus,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

ALL = os.environ.get("DUALTOK_PARITY", "") == "all"
STEPS = 12 if ALL else 6
BLOCKS = 4
"""Blocks of a global micro-batch."""
MARGIN = 1e-4
"""Nats that no token may be near a border of the selection, so that rounding cannot move it across."""
CLIPPING = 0.05
WIDE = 0.25
"""Standard deviation of the first weights: losses spread over many nats, so that few scores are close to each other."""
SEEDS = {1: 1, 2: 9, 4: 1}
"""Seed by accumulation: some for which :data:`MARGIN` holds in every baseline, which is asserted."""

SHARDED = {"stage3_param_persistence_threshold": 0}
OFFLOADED = {**SHARDED, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@dataclass(frozen=True)
class Cell:
    """One layout. ``ranks`` are those of the whole job."""

    ranks: int
    stage: int
    stages: int = 1
    accumulation: int = 1
    scope: str = "micro_batch"
    precision: str = "fp32"
    tied: bool = False
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    pipeline: dict[str, Any] = field(default_factory=dict, hash=False)
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    ci: bool = False
    refused: str | None = None
    """What the error must say where a combination cannot run."""

    @property
    def engine(self) -> str:
        return "zero" if self.stages == 1 else "sharded_pipeline" if self.stage == 3 else "pipeline"

    @property
    def name(self) -> str:
        parts = [
            f"{self.ranks}ranks",
            f"{self.engine}{self.stages}x{self.ranks // self.stages}",
            f"zero{self.stage}",
            f"acc{self.accumulation}",
            self.scope,
            self.precision,
            *(["tied"] if self.tied else []),
            *sorted(self.pipeline),
            *(["offload"] if "offload_param" in self.zero else []),
            *sorted(map(str, self.model.values())),
        ]
        return "-".join(parts)

    @property
    def baseline(self) -> Cell:
        """One process that this cell must equal; bf16 needs stage 1, where gradients are accumulated in fp32."""
        local = self.scope == "local"
        return Cell(
            ranks=self.ranks // self.stages if local else 1,
            stage=0 if self.precision == "fp32" else 1,
            accumulation=self.accumulation,
            scope=self.scope,
            precision=self.precision,
            tied=self.tied,
            model=self.model,
            ci=self.ci,
        )


CELLS = [
    Cell(1, 2),
    Cell(1, 3, accumulation=4, zero=SHARDED),
    Cell(2, 0, accumulation=2),
    Cell(2, 1, accumulation=4, tied=True, ci=True),
    Cell(2, 2, scope="step", accumulation=2, ci=True),
    Cell(2, 3, accumulation=2, zero=SHARDED, tied=True),
    Cell(2, 3, accumulation=4, zero=OFFLOADED, ci=True),
    Cell(2, 3, scope="step", accumulation=4, zero=SHARDED, ci=True),
    Cell(2, 1, precision="bf16", accumulation=2),
    Cell(2, 3, precision="bf16", accumulation=2, zero=SHARDED, ci=True),
    Cell(2, 0, stages=2, accumulation=4, ci=True),
    Cell(2, 1, stages=2, accumulation=1),
    Cell(2, 1, stages=2, accumulation=4, tied=True, ci=True),
    Cell(2, 1, stages=2, accumulation=2, precision="bf16", ci=True),
    Cell(2, 3, stages=2, accumulation=4, zero=SHARDED, tied=True, ci=True),
    Cell(2, 3, stages=2, accumulation=1, zero=SHARDED),
    Cell(2, 0, stages=2, accumulation=2, model={"model_type": "gpt2"}, tied=True, ci=True),
    Cell(2, 3, stages=2, accumulation=2, model={"model_type": "gpt2"}, tied=True),
    Cell(2, 2, stages=2, refused="stage 0 or 1", ci=True),
    Cell(2, 1, stages=2, scope="step", accumulation=2, refused="selection.scope", ci=True),
    Cell(4, 1, accumulation=1, tied=True),
    Cell(4, 2, accumulation=2),
    Cell(4, 3, scope="step", accumulation=2, zero=SHARDED),
    Cell(4, 3, accumulation=4, zero=SHARDED),
    Cell(4, 0, stages=2, accumulation=4, tied=True),
    Cell(4, 1, stages=2, accumulation=2, ci=True),
    Cell(4, 1, stages=2, accumulation=2, precision="bf16", tied=True),
    Cell(4, 1, stages=2, accumulation=4, scope="local"),
    Cell(4, 3, stages=2, accumulation=4, zero=SHARDED, ci=True),
    Cell(4, 3, stages=2, accumulation=2, zero=SHARDED, tied=True, ci=True),
    Cell(4, 3, stages=2, accumulation=4, zero=OFFLOADED, ci=True),
    Cell(4, 3, stages=2, accumulation=4, zero=OFFLOADED, tied=True),
    Cell(4, 3, stages=2, accumulation=2, pipeline={"keep_gathered": True}, ci=True),
    Cell(4, 3, stages=2, accumulation=2, precision="bf16", zero=SHARDED, ci=True),
    Cell(4, 3, stages=2, accumulation=4, scope="local", zero=SHARDED),
    Cell(4, 1, stages=4, accumulation=4),
    Cell(4, 3, stages=4, accumulation=4, zero=SHARDED, tied=True),
]
CHOSEN = [cell for cell in CELLS if cell.ci or ALL]

# One worker trains all cells, for all tests; the first of them waits for that.
pytestmark = pytest.mark.timeout(3000)


def run_file(folder: Path, corpus: dict[str, Any], cell: Cell) -> Path:
    """Write a cell's run and DeepSpeed JSON."""
    ds = folder / f"{cell.name}.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": cell.stage, **cell.zero}}))
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 2,
        "n_positions": 64,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": WIDE,
    }
    # In bf16 tokens do change sides; from ordinary weights their losses differ little, and so does what follows.
    spread = WIDE if cell.precision == "fp32" else 0.02
    llama = tiny_llama_config(num_hidden_layers=4, tie_word_embeddings=cell.tied, initializer_range=spread)
    pipeline = {} if cell.stages == 1 else {"pipeline": {"stages": cell.stages, **cell.pipeline}}
    return write_run(
        folder / f"{cell.name}.yaml",
        corpus,
        seed=SEEDS[cell.accumulation],
        objective="dual",
        model={"config": gpt2 if cell.model else llama},
        selection={"scope": cell.scope},
        reference={"model": str(folder / "reference")},
        monitor={"log_every": 100, "histogram_every": 0},
        train={
            "learning_rate": 1e-3,
            "batch_size": BLOCKS * cell.accumulation,
            "steps": STEPS,
            "warmup_steps": 3,
            "gradient_accumulation": cell.accumulation,
            "gradient_clipping": CLIPPING,
            "epsilon": 1e-6,
            "precision": cell.precision,
            "evaluation_blocks": 4,
            "engine": cell.engine,
            "deepspeed": str(ds),
            **pipeline,
        },
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all chosen cells and their baselines, one launch per number of ranks; return the folder of the runs."""
    folder = tmp_path_factory.mktemp("parity")
    corpus = write_small_corpus(folder / "corpus", characters=None)
    model = save_model(folder / "reference", seed=7, initializer_range=WIDE)
    score = write_run(folder / "score.yaml", corpus, reference={"model": str(model)})
    succeed(dualtok("score", score))
    wanted = {cell.name: cell for chosen in CHOSEN for cell in (chosen, chosen.baseline) if not cell.refused}
    wanted |= {cell.name: cell for cell in CHOSEN if cell.refused}
    for ranks in sorted({cell.ranks for cell in wanted.values()}):
        # Pipelines last: their process groups stay behind in the process.
        cells = sorted((cell for cell in wanted.values() if cell.ranks == ranks), key=lambda cell: cell.stages)
        files = [run_file(folder, corpus, cell) for cell in cells]
        job = command("tests.multi_rank.train_cells", *files, ranks=ranks)
        done = subprocess.run(
            job,
            env=environment(LOCAL_SIZE=str(ranks)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, f"{ranks} ranks\n{done.stdout[-3000:]}\n{done.stderr[-8000:]}"
    return folder


def history(folder: Path, cell: Cell, column: str) -> np.ndarray:
    """Return a column of a cell's metrics, one value per step."""
    lines = (folder / cell.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)[column] for line in lines])


def selections(folder: Path, cell: Cell) -> list[dict[str, list[Any]]]:
    """Return what each micro-batch (with scope step: each step) learned and unlearned, token by token in the order of
    the global batch."""
    rows: list[dict[str, list[Any]]] = json.loads((folder / cell.name / SELECTION_FILE).read_text(encoding="utf-8"))
    together = cell.accumulation if cell.scope == "step" else 1
    return [
        {key: [value for row in rows[first : first + together] for value in row[key]] for key in rows[0]}
        for first in range(0, len(rows), together)
    ]


def final_weights(folder: Path, cell: Cell) -> dict[str, torch.Tensor]:
    """Return the weights that ``dualtok export`` makes of a cell's last checkpoint."""
    target = folder / f"{cell.name}.hf"
    if not target.exists():
        export(folder / cell.name, target, which="latest")
    return read_weights(target)


def margin(rows: list[dict[str, list[Any]]]) -> float:
    """Return how near any score came to a border between two sets, nats."""
    nearest = math.inf
    for row in rows:
        s, hard, memorized = (np.array(row[key]) for key in ("calibrated", "hard", "memorized"))
        neutral = ~hard & ~memorized
        assert hard.any()
        assert memorized.any()
        assert neutral.any()
        # Unlearned are the lowest scores, as many as the share allows, and of those only the ones below tau = 0.
        share_is_full = memorized.sum() == int(0.2 * len(s) + 1e-9)
        next_to_unlearned = s[neutral].min() - (s[memorized].max() if share_is_full else 0.0)
        nearest = min(nearest, s[hard].min() - s[~hard].max(), -s[memorized].max(), next_to_unlearned)
    return float(nearest)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CHOSEN if not cell.refused], ids=lambda cell: cell.name)
def test_a_layout_trains_the_same_model(trained: Path, cell: Cell) -> None:
    expected = cell.baseline
    norms = history(trained, expected, "gradient_norm")
    assert len(norms) == STEPS
    assert (norms > CLIPPING).all(), "clipping was not active"
    tolerance = 1e-5 if cell.precision == "fp32" else 5e-3
    for column in ("loss", "gradient_norm"):
        found, known = history(trained, cell, column), history(trained, expected, column)
        np.testing.assert_allclose(found, known, rtol=tolerance if column == "loss" else 10 * tolerance, err_msg=column)
    if cell.precision == "fp32":
        known_rows, rows = selections(trained, expected), selections(trained, cell)
        # With scope local each rank has borders of its own, which the rows, one per global micro-batch, do not show.
        assert cell.scope == "local" or margin(known_rows) > MARGIN, "a token is near a border, take another seed"
        assert len(rows) == len(known_rows) >= STEPS
        for row, known_row in zip(rows, known_rows, strict=True):
            assert row["hard"] == known_row["hard"]
            assert row["memorized"] == known_row["memorized"]
    weights = [final_weights(trained, each) for each in (expected, cell)]
    assert relative_distance(*weights) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CHOSEN if cell.refused], ids=lambda cell: cell.name)
def test_what_cannot_run_is_refused_with_words(trained: Path, cell: Cell) -> None:
    assert cell.refused is not None
    assert cell.refused in (trained / cell.name / REFUSED_FILE).read_text(encoding="utf-8")
