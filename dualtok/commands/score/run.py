"""``dualtok score``: the frozen reference's loss on every token, once, beside the shards.

Each rank takes whole shards and writes each as soon as it is scored, so that an interrupted job continues with the next
shard, on any number of ranks. Under a ZeRO-3 engine all ranks make the same number of forward passes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dualtok.commands.score.files import ScoreFiles
from dualtok.data.folds import fold_of
from dualtok.data.mixed import load_sources
from dualtok.data.packing import pad_rows
from dualtok.distributed.forward_only import build_forward_only
from dualtok.distributed.ranks import join_ranks
from dualtok.errors import ConfigError
from dualtok.monitor.progress import RunProgress
from dualtok.reference.fingerprint import blocks_digest, cross_fitted, fingerprint
from dualtok.reference.stored import StoredLosses
from dualtok.train.live_reference import check_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualtok.config.reference import ReferenceConfig
    from dualtok.config.run import RunConfig
    from dualtok.data.folder import DataFolder
    from dualtok.data.manifest import ShardEntry
    from dualtok.data.mixed import Source
    from dualtok.data.stream.blocks import BlockStream
    from dualtok.distributed.ranks import Ranks
    from dualtok.model.losses import Batch
    from dualtok.reference.fingerprint import Fingerprint


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring job did on all ranks."""

    folder: str
    """Where the scores of ``data.dir`` are; those of the folders of ``data.mix`` are in their own."""
    shards: int
    """Shards that belong to the fingerprint, of all folders."""
    scored: int
    """Shards scored by this job; the others were there already."""
    tokens_per_second: float
    """Block positions per second over all ranks while scoring; 0 when there was nothing to do."""


@dataclass(frozen=True)
class _Task:
    source: Source
    files: ScoreFiles
    split: str
    shard: ShardEntry

    @property
    def name(self) -> str:
        """The score file's name in the index."""
        return f"{self.folder}/{self.shard.stem}.arrow"

    @property
    def folder(self) -> str:
        """The split's folder, under which its scores lie too."""
        return self.source.manifest.folder_of(self.split)


def score(run: RunConfig) -> ScoreSummary:
    """Score the splits of ``reference.splits`` that are not scored yet; of ``data.mix`` the split to train on alone.

    With ``reference.folds`` every model scores all blocks, and each document's losses are then taken from the model
    that left it out.

    Raises:
        ConfigError: there is no section ``reference``, or its model does not fit the blocks.
        DataError: a shard is missing or altered, or the reference gives a loss that is not finite.
    """
    reference: ReferenceConfig = run.need("reference", "score")
    if reference.is_live:
        raise ConfigError(
            f"reference.mode: {reference.mode!r} computes the losses while training, so there is nothing to score; "
            "start `dualtok train`, or use reference.mode=stored"
        )
    trained = run.train.split if run.train is not None else "train"
    sources = load_sources(run.data, trained)
    splits = [reference.splits, *[(trained,)] * (len(sources) - 1)]
    ranks = join_ranks()
    jobs = [_score_with(model, reference, list(zip(sources, splits, strict=True)), ranks) for model in reference.models]
    if not reference.folds:
        return jobs[0][0]
    expected = cross_fitted([fingerprint for _, fingerprint in jobs])
    targets = ranks.together(lambda: [_score_files(source, expected) for source in sources])
    tasks = _all_tasks(sources, splits, targets)
    checksums = _checksums(tasks, ranks)
    missing = [i for i in range(len(tasks)) if i not in checksums]
    mine = missing[ranks.rank :: ranks.world_size]
    folds = [fingerprint for _, fingerprint in jobs]
    written = ranks.together(lambda: {i: _cross_fit(tasks[i], folds) for i in mine})
    for part in ranks.gather_objects(written):
        checksums |= part
    _write_indices(tasks, targets, checksums, " + ".join(reference.folds), ranks)
    rate = sum(summary.tokens_per_second for summary, _ in jobs) / len(jobs)
    return ScoreSummary(str(targets[0]), len(tasks), len(missing), rate)


def _score_with(
    model: str, reference: ReferenceConfig, sources: list[tuple[Source, Sequence[str]]], ranks: Ranks
) -> tuple[ScoreSummary, Fingerprint]:
    """Score what one model has not scored yet."""
    data = sources[0][0].folder
    one = replace(reference, model=model, folds=())
    folder = Path(ranks.first_does(lambda: check_reference(one, data)))
    expected = ranks.first_does(lambda: fingerprint(folder, data.manifest, reference.precision))
    targets = ranks.together(lambda: [_score_files(source, expected) for source, _ in sources])
    tasks = _all_tasks([source for source, _ in sources], [splits for _, splits in sources], targets)
    checksums = _checksums(tasks, ranks)
    missing = [i for i in range(len(tasks)) if i not in checksums]
    rate = 0.0
    if missing:
        forward = build_forward_only(
            folder,
            precision=reference.precision,
            batch_size=reference.batch_size,
            deepspeed_json=reference.deepspeed,
            ranks=ranks,
            trust_remote_code=reference.trust_remote_code,
        )
        scored, rate = _score_shards([tasks[i] for i in missing], forward, reference.batch_size, ranks)
        checksums |= dict(zip(missing, scored, strict=True))
    _write_indices(tasks, targets, checksums, model, ranks)
    return ScoreSummary(str(targets[0]), len(tasks), len(missing), rate), expected


def _write_indices(
    tasks: list[_Task], targets: list[ScoreFiles], checksums: dict[int, str], model: str, ranks: Ranks
) -> None:
    def write() -> None:
        for files in targets:
            files.finish(model, {task.name: checksums[i] for i, task in enumerate(tasks) if task.files is files})

    ranks.first_does(write)


def _cross_fit(task: _Task, folds: list[Fingerprint]) -> str:
    """Write a shard's losses, each document's from the model that left its fold out; returns their SHA-256."""
    stream = task.source.folder.open(task.split, verify=False)
    rows = np.arange(task.shard.rows)
    digest = blocks_digest(task.source.manifest)
    everyone = np.stack(
        [
            StoredLosses(task.source.folder, task.split, replace(fold, blocks=digest), rank=-1).read(
                task.shard.stem, rows
            )
            for fold in folds
        ]
    )
    losses = np.zeros(everyone.shape[1:], dtype=np.float32)
    for row, pieces in enumerate(stream.pieces(task.shard.file, rows)):
        chosen, column = fold_of([piece.doc for piece in pieces], len(folds)), 0
        for fold, piece in zip(chosen, pieces, strict=True):
            here = slice(column, column + piece.length)
            losses[row, here] = everyone[fold, row, here]
            column += piece.length
    return task.files.write(task.folder, task.shard, losses)


def _score_files(source: Source, expected: Fingerprint) -> ScoreFiles:
    return ScoreFiles(source.folder.location, replace(expected, blocks=blocks_digest(source.manifest)))


def _checksums(tasks: list[_Task], ranks: Ranks) -> dict[int, str]:
    """Return the checksums of the scores that are there; ranks split the work."""

    def look_up_mine() -> dict[int, str]:
        mine = {
            i: tasks[i].files.checksum(tasks[i].folder, tasks[i].shard)
            for i in range(ranks.rank, len(tasks), ranks.world_size)
        }
        return {i: checksum for i, checksum in mine.items() if checksum is not None}

    found = ranks.together(look_up_mine)
    return {i: checksum for part in ranks.gather_objects(found) for i, checksum in part.items()}


def _all_tasks(
    sources: Sequence[Source], splits: Sequence[Sequence[str]], targets: Sequence[ScoreFiles]
) -> list[_Task]:
    """Return one task per shard of the splits that are scored of each source."""
    every = zip(sources, splits, targets, strict=True)
    return [task for source, names, files in every for task in _tasks(source, names, files)]


def _tasks(source: Source, splits: Sequence[str], files: ScoreFiles) -> list[_Task]:
    return [_Task(source, files, split, shard) for split in splits for shard in source.folder.entry(split).shards]


def _score_shards(
    tasks: list[_Task], forward: Callable[[Batch], torch.Tensor], batch_size: int, ranks: Ranks
) -> tuple[list[str], float]:
    """Score shards, rank r every world_size-th of them.

    Returns:
        The checksum of each one's scores, and positions per second over all ranks.
    """
    mine = tasks[ranks.rank :: ranks.world_size]
    calls = [-(-task.shard.rows // batch_size) for task in mine]
    most_calls = max(ranks.gather_objects(sum(calls)))
    streams = ranks.together(
        lambda: {
            (folder, split): folder.open(split, verify_rank=ranks.rank, verify_world_size=ranks.world_size)
            for folder, split in {(task.source.folder, task.split) for task in tasks}
        }
    )
    started = time.perf_counter()
    positions = 0
    checksums: list[str] = []
    last: Batch | None = None
    with RunProgress("score", most_calls, active=ranks.is_first, plain_every=max(1, most_calls // 20)) as progress:
        for task in mine:
            losses = []
            for first in range(0, task.shard.rows, batch_size):
                rows = np.arange(first, min(first + batch_size, task.shard.rows))
                last = streams[task.source.folder, task.split].read_rows(task.shard.file, rows)
                # Filled up, so that every rank calls each layer equally often, chunk by chunk, under ZeRO-3.
                losses.append(forward(pad_rows(last, batch_size))[: len(rows)].float().cpu().numpy())
                positions += last["input_ids"].numel()
                progress.advance(1, f"{positions / (time.perf_counter() - started):,.0f} tokens/s on this rank")
            checksums.append(task.files.write(task.folder, task.shard, np.concatenate(losses)))
        last = last if last is not None else _any_batch(streams, tasks[0])
        for _ in range(most_calls - sum(calls)):
            forward(
                pad_rows(last, batch_size)
            )  # under ZeRO-3 a rank that stopped early would leave the others waiting for its weights
    seconds = time.perf_counter() - started
    total = float(ranks.sum(torch.tensor(float(positions), dtype=torch.float64, device=ranks.device)))
    everyone = ranks.gather_objects(checksums)
    in_order = [everyone[i % ranks.world_size][i // ranks.world_size] for i in range(len(tasks))]
    return in_order, total / max(ranks.gather_objects(seconds))


def _any_batch(streams: dict[tuple[DataFolder, str], BlockStream], task: _Task) -> Batch:
    return streams[task.source.folder, task.split].read_rows(task.shard.file, np.arange(1))
