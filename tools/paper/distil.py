"""A student that learns what teachers expect of each token, and never what came next in a text.

    python tools/paper/distil.py RUN.yaml TARGET --teachers models/fold_0 models/fold_1
    python tools/paper/distil.py RUN.yaml TARGET --teachers models/plain --splits reference auxiliary

The run file says which data, which starting weights (``model.path``) and how it is trained. Of several teachers each
left out its fold of the documents (``train.leave_out``), and the student learns on a document what the one expects that
has not seen it (compare SELENA, Tang et al. 2022, arXiv 2110.08324). One teacher teaches on all of them; on public text
it makes a public student. The loss is the Kullback-Leibler divergence KL(teacher || student) over the vocabulary, a
mean over tokens. All blocks are in memory at once: this is a baseline for small models.

Legend: b batch, t position, v vocabulary.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from dualtok.config.folds import LeaveOut
from dualtok.config.load import load_run
from dualtok.data.folder import DataFolder
from dualtok.files import atomic_folder
from dualtok.model.load import load_causal_lm
from dualtok.objective.head import IGNORED_LABEL
from dualtok.train.optimizer import build_adamw, build_schedule

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Blocks:
    """Blocks to learn: ``input_ids``, ``position_ids``, ``labels`` and each token's ``teacher`` (-1: none) [n, t]."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor

    def rows(self, which: torch.Tensor) -> Blocks:
        """Return some of the blocks."""
        return Blocks(self.input_ids[which], self.position_ids[which], self.labels[which], self.teacher[which])


def read_blocks(data: DataFolder, splits: Sequence[str], teachers: int) -> Blocks:
    """Read all blocks of some splits.

    Args:
        data: the prepared folder.
        splits: their names.
        teachers: how many there are; each but a single one has left out the fold of its number.
    """
    found: list[Blocks] = []
    for split in splits:
        stream = data.open(split)
        batch = stream.read(range(len(stream)))
        learned = batch["labels"] != IGNORED_LABEL
        teacher = torch.where(learned, 0, -1)
        for fold in range(teachers if teachers > 1 else 0):
            without = data.open(split, leave_out=LeaveOut(fold=fold, folds=teachers)).read(range(len(stream)))
            teacher[learned & (without["labels"] == IGNORED_LABEL)] = fold
        found.append(Blocks(batch["input_ids"], batch["position_ids"], batch["labels"], teacher))
    names = ("input_ids", "position_ids", "labels", "teacher")
    return Blocks(*(torch.cat([getattr(part, name) for part in found]) for name in names))


def soft_loss(student_btv: torch.Tensor, expected_btv: torch.Tensor, taught_bt: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher || student) of the tokens that are taught, in nats.

    Args:
        student_btv: logits.
        expected_btv: log-probabilities of each token's teacher.
        taught_bt: which tokens count.
    """
    expected, got = expected_btv[taught_bt], functional.log_softmax(student_btv[taught_bt].float(), -1)
    return functional.kl_div(got, expected, reduction="batchmean", log_target=True)


@torch.no_grad()
def expectations(teachers: Sequence[Any], blocks: Blocks) -> torch.Tensor:
    """Return the log-probabilities [b, t, v] of each token's own teacher."""
    expected = None
    for number, model in enumerate(teachers):
        found = functional.log_softmax(_logits(model, blocks).float(), -1)
        mine = (blocks.teacher == number).unsqueeze(-1)
        expected = found if expected is None else torch.where(mine, found, expected)
    assert expected is not None
    return expected


def _logits(model: Any, blocks: Blocks) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=blocks.input_ids, position_ids=blocks.position_ids, use_cache=False).logits
    return logits


def main() -> None:
    """Train the student and write it as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--teachers", type=Path, nargs="+", required=True)
    parser.add_argument("--splits", nargs="+", default=["train"])
    options = parser.parse_args()
    run = load_run(options.run)
    assert run.train is not None
    assert run.model is not None
    assert run.model.path is not None
    torch.manual_seed(run.seed)
    data = DataFolder.of_run(run.data)
    blocks = read_blocks(data, options.splits, len(options.teachers))
    teachers = [load_causal_lm(folder, attention="sdpa", trust_remote_code=False).eval() for folder in options.teachers]
    student = load_causal_lm(Path(run.model.path), attention="sdpa", trust_remote_code=False).train()

    size, batch_size = len(blocks.labels), run.train.batch_size
    steps = run.train.steps or max(1, round((run.train.epochs or 1) * size / batch_size))
    optimizer = build_adamw(student, run.train, on_host=False)
    schedule = build_schedule(run.train, steps)(optimizer)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(size)])
        part, order = blocks.rows(order[:batch_size]), order[batch_size:]
        loss = soft_loss(_logits(student, part), expectations(teachers, part), part.teacher >= 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), run.train.gradient_clipping or float("inf"))
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step} of {steps}: {loss.item():.4f} nats per token from the teachers", flush=True)
    with atomic_folder(options.target) as folder:
        student.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
