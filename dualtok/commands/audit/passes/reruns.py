"""The audit's reruns of models over changed texts: which are needed, on whose documents, and where they are kept.

A rerun that is kept is not made again, so that attacks and intervals can be changed without a model.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.registry import ATTACKS
from dualtok.audit.attacks.rerun import RERUNS, choose_prefix, join_prefix, prefix_budget
from dualtok.audit.signals.reruns import Documents, RerunResult, Tools
from dualtok.audit.statistics.evaluate import choose_documents
from dualtok.data.tokenizer import encode
from dualtok.distributed.forward_only import build_forward_only
from dualtok.model.gradients import build_gradient_norm
from dualtok.model.sequence_scorer import SequenceScorer, SequenceSignals
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from dualtok.audit.attacks.base import AttackContext
    from dualtok.audit.settings import AuditConfig
    from dualtok.audit.signals.reruns import Ids, Rerun, Side
    from dualtok.audit.signals.signals import Signals
    from dualtok.data.folder import DataFolder
    from dualtok.data.stream.blocks import BlockStream
    from dualtok.distributed.ranks import Ranks

VERSION = 1
"""Of what the reruns compute: part of the name that their results are kept under."""
CHUNK = 256
"""Documents per call of a rerun and rank."""


@dataclass(frozen=True)
class RerunResults:
    """What the reruns left, on rank 0."""

    results: dict[tuple[str, str], dict[str, RerunResult]] = field(default_factory=dict)
    """(Model, split) -> name of a rerun -> its result."""
    missing: dict[str, str] = field(default_factory=dict)
    """Name of a rerun that an attack asked for and that cannot be made -> what it would need."""
    prefixes: dict[str, list[int]] = field(default_factory=dict)
    """Split -> documents that are put in front of others."""

    def known(self, model: str, split: str, context: AttackContext) -> AttackContext:
        """Return a context to which a model's reruns over a split are added."""
        reruns = self.results.get((model, split), {})
        return dataclasses.replace(context, reruns=reruns, missing_reruns=self.missing)

    def without_prefixes(self, signals: dict[str, dict[str, Signals]]) -> dict[str, dict[str, Signals]]:
        """Return the signals of every model and split without the documents that are put in front of others."""
        return {
            model: {
                split: own.take(np.flatnonzero(~np.isin(own.document, self.prefixes.get(split, []))))
                for split, own in by_split.items()
            }
            for model, by_split in signals.items()
        }


def rerun_models(
    settings: AuditConfig,
    data: DataFolder,
    folders: Mapping[str, Path],
    ranks: Ranks,
    kept: Path,
    *,
    keys: Mapping[str, str],
    left_out: Callable[[str], set[int]],
) -> RerunResults:
    """Make the reruns that the audit's attacks need beyond the one that all share; results are on rank 0 alone.

    Args:
        settings: name the attacks.
        data: the documents.
        folders: name of each audited model -> its folder.
        ranks: the job's ranks, which share the documents.
        kept: where results are kept.
        keys: name of each audited model -> a name of its weights, the blocks and the choice of documents.
        left_out: function from a split to documents of it that are not audited with the others, i.e. canaries.
    """
    wanted = [
        each for name, each in RERUNS.items() if any(name in ATTACKS[attack].needs for attack in settings.attacks)
    ]
    if not wanted:
        return RerunResults()
    work = ranks.together(lambda: _Work(settings, data, ranks, left_out))
    missing = {each.name: reason for each in wanted if (reason := work.obstacle(each)) is not None}
    possible = [each for each in wanted if each.name not in missing]
    results: dict[tuple[str, str], dict[str, RerunResult]] = {}
    for model, folder in folders.items():
        files = {
            (each.name, split): kept / f"{work.key(keys[model], each)}-{each.name}-{split}.npz"
            for each in possible
            for split in work.lengths
        }
        absent = ranks.from_first([which for which, file in files.items() if not _stored(file).is_file()])
        for gradients in (False, True):
            due = [which for which in absent if RERUNS[which[0]].gradients == gradients]
            if due:
                work.run(model, folder, {which: files[which] for which in due}, gradients=gradients)
        if ranks.is_first:
            for (each_name, split), file in files.items():
                results.setdefault((model, split), {})[each_name] = RerunResult.load(_stored(file))
    prefixes = {
        work.split_of(each.prefix): work.prefix_documents(each.prefix) for each in possible if each.prefix is not None
    }
    return RerunResults(results, missing, prefixes)


def _stored(file: Path) -> Path:
    """Return where a result is kept: before 0.2 the folder was ``passes``."""
    earlier = file.parent.with_name("passes") / file.name
    return earlier if earlier.is_file() and not file.is_file() else file


class _Work:
    """One audit's documents, and the reruns over them."""

    def __init__(
        self, settings: AuditConfig, data: DataFolder, ranks: Ranks, left_out: Callable[[str], set[int]]
    ) -> None:
        self._settings, self._data, self._ranks = settings, data, ranks
        self._block_length = data.manifest.block_length
        self._tokenizer = data.tokenizer
        *head, self._eos = encode(self._tokenizer, [""])[0]
        self._bos = head[0] if head else None
        self.lengths: dict[str, dict[int, int]] = {
            split: self._lengths(split, left_out(split)) for split in settings.splits
        }
        """Split -> document -> its tokens in its first block; documents of one token are left out."""
        self._streams: dict[str, BlockStream] = {}
        self._shares: dict[str, Documents] = {}
        """Split -> this rank's documents."""

    def split_of(self, side: Side) -> str:
        """Return the split of a class."""
        return self._settings.splits[0 if side == "members" else 1]

    def prefix_documents(self, side: Side) -> list[int]:
        """Return the documents of a class that are put in front of others."""
        limit, budget = self._settings.reruns.prefix_documents, self._budget
        return choose_prefix(self.lengths[self.split_of(side)], budget, limit, self._settings.seed)

    def obstacle(self, each: Rerun) -> str | None:
        """Return what a rerun would need and does not have."""
        if self._data.manifest.is_masked:
            return "documents of which all tokens are trained, and of conversations not all are"
        if each.gradients and self._settings.deepspeed is not None:
            return "the whole model on every rank, which audit.deepspeed shards"
        if each.prefix is not None and self._budget < 1:
            return f"longer blocks than {self._block_length} tokens"
        if each.prefix is not None and not self.prefix_documents(each.prefix):
            return f"two documents in {self.split_of(each.prefix)}"
        return None

    def key(self, model: str, each: Rerun) -> str:
        """Name a rerun by all it depends on beside the model's own name."""
        settings = {name: getattr(self._settings.reruns, name) for name in each.settings}
        parts = [VERSION, model, settings, *self._settings.splits]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]

    def run(self, model: str, folder: Path, files: Mapping[tuple[str, str], Path], *, gradients: bool) -> None:
        """Make some reruns over some splits with one copy of a model, and keep each as soon as it is complete."""
        settings, ranks = self._settings, self._ranks
        scorer, gradient_norm = None, None
        if gradients:
            gradient_norm = ranks.together(
                lambda: build_gradient_norm(
                    folder,
                    precision=settings.precision,
                    device=ranks.device,
                    trust_remote_code=settings.trust_remote_code,
                )
            )
        else:
            signals = SequenceSignals(len(self._tokenizer), self._tokenizer.all_special_ids)
            forward = build_forward_only(
                folder,
                precision=settings.precision,
                batch_size=settings.batch_size,
                deepspeed_json=settings.deepspeed,
                ranks=ranks,
                signals=signals,
                trust_remote_code=settings.trust_remote_code,
            )
            scorer = SequenceScorer(
                forward,
                signals,
                block_length=self._block_length,
                batch_size=settings.batch_size,
                most=lambda calls: max(ranks.gather_objects(calls)),
            )
        for (name, split), file in files.items():
            result = self._rerun(RERUNS[name], scorer, gradient_norm, split, title=f"audit {model}, {split}: {name}")
            if result is not None:
                result.save(file)
        del scorer, gradient_norm
        gc.collect()  # before the next model is loaded
        ranks.barrier()

    def _rerun(
        self,
        each: Rerun,
        scorer: SequenceScorer | None,
        gradient_norm: Callable[[Ids], float] | None,
        split: str,
        *,
        title: str,
    ) -> RerunResult | None:
        """Make one rerun over a split; returns all ranks' documents on rank 0, None elsewhere."""
        ranks = self._ranks
        documents, prefixes = ranks.together(lambda: (self._share(split), self._prefixes(each)))
        tools = Tools(
            settings=self._settings.reruns,
            seed=self._settings.seed,
            block_length=self._block_length,
            lowercased=partial(
                lowercased,
                self._tokenizer,
                bos=self._bos,
                eos=self._eos,
                special=self._data.encodes_special_tokens,
                block_length=self._block_length,
            ),
            bos=self._bos,
            eos=self._eos,
            prefixes=prefixes,
            gradient_norm=gradient_norm,
        )
        calls = -(-len(self.lengths[split]) // (CHUNK * ranks.world_size))
        parts = []
        with RunProgress(title, calls, active=ranks.is_first, plain_every=max(1, calls // 4)) as progress:
            for first in range(0, calls * CHUNK, CHUNK):
                some = Documents(documents.numbers[first : first + CHUNK], documents.tokens[first : first + CHUNK])
                parts.append((np.array(some.numbers, dtype=np.int64), each.run(scorer, some, tools)))
                progress.advance(1)
        gathered = ranks.gather_objects_to_first(parts)
        if gathered is None:
            return None
        everyone = [part for theirs in gathered for part in theirs]
        numbers = np.concatenate([own for own, _ in everyone])
        order = np.argsort(numbers)
        columns = {name: np.concatenate([values[name] for _, values in everyone])[order] for name in everyone[0][1]}
        return RerunResult(numbers[order], columns)

    @property
    def _budget(self) -> int:
        return prefix_budget(self._settings.reruns, self._block_length)

    def _lengths(self, split: str, left_out: set[int]) -> dict[int, int]:
        table = self._data.documents(split)
        numbers, tokens = table["doc"].to_pylist(), table["n_tokens"].to_pylist()
        lengths = {number: length for number, length in zip(numbers, tokens, strict=True) if number not in left_out}
        chosen = choose_documents(np.array(list(lengths)), self._settings.max_documents, self._settings.seed)
        return {number: min(lengths[number], self._block_length) for number in chosen.tolist() if lengths[number] > 1}

    def _share(self, split: str) -> Documents:
        """Return this rank's documents of a split."""
        if split not in self._shares:
            mine = list(self.lengths[split])[self._ranks.rank :: self._ranks.world_size]
            self._shares[split] = Documents(mine, self._tokens(split, mine))
        return self._shares[split]

    def _prefixes(self, each: Rerun) -> dict[Side, Ids]:
        if each.prefix is None:
            return {}
        tokens = self._tokens(self.split_of(each.prefix), self.prefix_documents(each.prefix))
        return {each.prefix: join_prefix(tokens, self._budget, bos=self._bos, eos=self._eos)}

    def _tokens(self, split: str, documents: Sequence[int]) -> list[Ids]:
        """Return the token ids of some documents, as far as their first block goes, in the order asked."""
        if split not in self._streams:
            self._streams[split] = self._data.open(
                split, verify_rank=self._ranks.rank, verify_world_size=self._ranks.world_size
            )
        found: dict[int, Ids] = dict.fromkeys(documents, np.zeros(0, dtype=np.int64))
        wanted = np.array(sorted(documents), dtype=np.int64)
        for batch, segments in self._streams[split].sequential(self._settings.batch_size, documents=wanted):
            for ids, row in zip(batch["input_ids"].numpy(), segments, strict=True):
                column = 0
                for document, start, length in row:
                    if start == 0 and document in found:
                        found[document] = ids[column : column + length]
                    column += length
        return list(found.values())


def lowercased(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Ids],
    *,
    bos: int | None,
    eos: int,
    block_length: int,
    special: bool = False,
) -> list[Ids]:
    """Return the token ids of the same texts in lower case, cut to a block; end tokens stay or stay away."""
    ends = [bool(tokens[-1] == eos) for tokens in documents]
    bodies = [
        tokens[0 if bos is None else 1 : -1 if end else None] for tokens, end in zip(documents, ends, strict=True)
    ]
    texts = [str(tokenizer.decode(body, clean_up_tokenization_spaces=False)).lower() for body in bodies]
    encoded = encode(tokenizer, texts, special=special) if texts else []
    again = [
        np.array(ids if end else ids[:-1], dtype=np.int64)[:block_length]
        for ids, end in zip(encoded, ends, strict=True)
    ]
    # A text may vanish, e.g. one of spaces under a tokenizer that strips them: it then differs from itself in nothing.
    return [lower if len(lower) > 1 else tokens for lower, tokens in zip(again, documents, strict=True)]
