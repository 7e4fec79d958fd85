"""``dualtok audit --extract N``: models continue the beginnings of documents by greedy decoding, and the truth is held
beside what they wrote.

Ranks share the documents, and what was found is kept, so that it is not computed again. Only numbers are kept: what a
model wrote is not.
"""

from __future__ import annotations

import gc
import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualtok.audit.report.details import Continuation, Continuations
from dualtok.audit.signals.reruns import RerunResult
from dualtok.audit.statistics.evaluate import choose_documents
from dualtok.audit.statistics.regurgitation import exact_share, longest_common_run, run_lengths, verbatim_tokens
from dualtok.data.stream.documents import document_pieces
from dualtok.errors import ConfigError
from dualtok.model.load import load_causal_lm
from dualtok.monitor.progress import RunProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dualtok.audit.report.data import ModelAudit
    from dualtok.audit.settings import AuditConfig
    from dualtok.data.folder import DataFolder
    from dualtok.distributed.ranks import Ranks

    Ids = NDArray[np.int64]
    Found = dict[tuple[str, str], RerunResult]
    """(Model, split) -> of each document that was continued ``verbatim`` and ``common``, in tokens."""

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

VERSION = 1
"""Of what is computed: part of the name that results are kept under."""


def choose_samples(settings: AuditConfig, data: DataFolder, left_out: Callable[[str], set[int]]) -> dict[str, Ids]:
    """Return split -> the documents of it that models are to continue, ascending; nothing without ``audit.extract``.

    Args:
        settings: the audit's.
        data: the documents.
        left_out: function from a split to documents of it that are not audited, i.e. canaries.

    Raises:
        ConfigError: prefix and continuation do not fit a block, or no document of a split is that long.
    """
    if settings.extract is None:
        return {}
    if data.manifest.is_masked:
        raise ConfigError(
            "audit.extract: continues texts, and these data are conversations of which not all tokens are trained; "
            "remove it"
        )
    needed, block_length = settings.extract_prefix + settings.extract_tokens, data.manifest.block_length
    lengths = f"audit.extract_prefix + audit.extract_tokens: {settings.extract_prefix} + {settings.extract_tokens}"
    if needed > block_length:
        raise ConfigError(f"{lengths} tokens do not fit the data's blocks of {block_length}; give fewer")
    samples = {}
    for split in settings.splits:
        table = data.documents(split)
        tokens = dict(zip(table["doc"].to_pylist(), table["n_tokens"].to_pylist(), strict=True))
        audited = [document for document in tokens if document not in left_out(split)]
        chosen = choose_documents(np.array(audited), settings.max_documents, settings.seed)
        long_enough = [document for document in chosen.tolist() if tokens[document] >= needed]
        if not long_enough:
            raise ConfigError(f"{lengths} tokens are more than any document of {split!r} has; give fewer")
        samples[split] = choose_documents(long_enough, settings.extract, settings.seed)
    return samples


def continue_models(
    samples: Mapping[str, Ids],
    settings: AuditConfig,
    data: DataFolder,
    folders: Mapping[str, Path],
    *,
    ranks: Ranks,
    kept: Path,
    keys: Mapping[str, str],
) -> Found:
    """Let each model continue the sampled documents; results are on rank 0 alone.

    Args:
        samples: of :func:`choose_samples`.
        settings: the audit's.
        data: the documents.
        folders: name of each audited model -> its folder.
        ranks: the job's ranks, which share the documents.
        kept: where results are kept.
        keys: name of each audited model -> a name of its weights, the blocks and the choice of documents.
    """
    if not samples:
        return {}
    files = {(name, split): kept / f"{_key(settings, keys[name])}-{split}.npz" for name in folders for split in samples}
    absent = ranks.from_first([which for which, file in files.items() if not file.is_file()])
    texts: dict[str, Ids] = {}
    for name, folder in folders.items():
        due = [split for model, split in absent if model == name]
        if not due:
            continue
        model = ranks.together(partial(_GreedyModel, folder, settings, ranks.device))
        for split in due:
            if split not in texts:
                texts[split] = ranks.together(partial(_tokens, settings, data, split, samples[split], ranks=ranks))
            result = _continue(
                model, samples[split], texts[split], settings, ranks=ranks, title=f"continue {name}, {split}"
            )
            if result is not None:
                result.save(files[name, split])
        del model
        gc.collect()  # before the next model is loaded
        ranks.barrier()
    return {which: RerunResult.load(file) for which, file in files.items()} if ranks.is_first else {}


def with_continuations(audit: ModelAudit, found: Found, settings: AuditConfig) -> ModelAudit:
    """Return a model's figures with what it wrote after the beginnings of documents, if it was asked to."""
    if not found or audit.regurgitation is None:
        return audit
    sides = [found[audit.name, split] for split in settings.splits]
    verbatim = [side.values["verbatim"].astype(np.int64) for side in sides]
    common = [side.values["common"].astype(np.int64) for side in sides]
    whole = [exact_share(own == settings.extract_tokens, settings.confidence) for own in verbatim]
    assert whole[0] is not None  # samples are never empty
    assert whole[1] is not None
    members, non_members = (
        [
            Continuation(document=document, verbatim=first, common=longest)
            for document, first, longest in zip(side.document.tolist(), own.tolist(), shared.tolist(), strict=True)
        ]
        for side, own, shared in zip(sides, verbatim, common, strict=True)
    )
    record = Continuations(
        prefix=settings.extract_prefix,
        tokens=settings.extract_tokens,
        members=members,
        non_members=non_members,
        whole_members=whole[0],
        whole_non_members=whole[1],
        runs_members=run_lengths(common[0]),
        runs_non_members=run_lengths(common[1]),
    )
    return audit.model_copy(update={"regurgitation": audit.regurgitation.model_copy(update={"continuations": record})})


class _GreedyModel:
    """A whole model that writes the likeliest token again and again, whatever its folder says about decoding."""

    def __init__(self, folder: Path, settings: AuditConfig, device: torch.device) -> None:
        from transformers import GenerationConfig

        causal_lm = load_causal_lm(folder, precision=settings.precision, trust_remote_code=settings.trust_remote_code)
        torch.nn.Module.to(causal_lm, device)
        self._model: Any = causal_lm.eval()
        # Without an end token it writes on after one: as many tokens as the truth has. A penalty or a list of
        # suppressed tokens in the folder's generation_config.json would change what is likeliest.
        self._model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=settings.extract_tokens, eos_token_id=None, pad_token_id=0
        )
        self._device = device

    def __call__(self, prefixes: Ids) -> Ids:
        """Return what the model writes [b, tokens] after prefixes of one length [b, prefix]."""
        ids = torch.from_numpy(prefixes).to(self._device)
        with torch.no_grad():
            written = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        own: Ids = written[:, prefixes.shape[1] :].cpu().numpy()
        return own


def _key(settings: AuditConfig, model: str) -> str:
    """Name results by all they depend on beside the model's own name."""
    sizes = (settings.extract, settings.extract_prefix, settings.extract_tokens)
    parts = [VERSION, model, *sizes, settings.members, settings.non_members]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _tokens(settings: AuditConfig, data: DataFolder, split: str, documents: Ids, *, ranks: Ranks) -> Ids:
    """Return the first tokens of this rank's documents [n, prefix + tokens]."""
    needed = settings.extract_prefix + settings.extract_tokens
    stream = data.open(split, verify_rank=ranks.rank, verify_world_size=ranks.world_size)
    pieces = document_pieces(stream, documents[ranks.rank :: ranks.world_size], settings.batch_size)
    return np.array([parts[0].ids[:needed] for parts in pieces.values()], dtype=np.int64).reshape(-1, needed)


def _continue(
    model: _GreedyModel, documents: Ids, texts: Ids, settings: AuditConfig, *, ranks: Ranks, title: str
) -> RerunResult | None:
    """Let a model continue this rank's documents; returns all ranks' on rank 0, None elsewhere."""
    size, found = settings.batch_size, []
    calls = -(-len(texts) // size)
    with RunProgress(title, calls, active=ranks.is_first, plain_every=max(1, calls // 4)) as progress:
        for first in range(0, len(texts), size):
            some = texts[first : first + size]
            truths = some[:, settings.extract_prefix :]
            for written, truth in zip(model(some[:, : settings.extract_prefix]), truths, strict=True):
                found.append((verbatim_tokens(written, truth), longest_common_run(written, truth)))
            progress.advance(1)
    mine = documents[ranks.rank :: ranks.world_size]
    gathered = ranks.gather_objects_to_first((mine, np.array(found, dtype=np.float64).reshape(-1, 2)))
    if gathered is None:
        return None
    numbers, values = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
    order = np.argsort(numbers)
    return RerunResult(numbers[order], {"verbatim": values[order, 0], "common": values[order, 1]})
