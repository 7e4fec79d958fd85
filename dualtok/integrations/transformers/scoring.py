"""The reference's loss on every token of a dataset, as a column of it.

Legend: b rows of a forward pass, t position.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from dualtok.errors import ConfigError, DataError
from dualtok.integrations.transformers.collator import REFERENCE_LOSS, DualCollator
from dualtok.integrations.transformers.loss_function import ranks_of_job
from dualtok.integrations.transformers.token_losses import causal_lm_of, token_losses_of
from dualtok.model.load import load_causal_lm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

PART_ROWS = 4096
"""Rows that are scored and cached together: a job that was interrupted goes on with the parts that are not there."""
SORTED_ROWS = 512
"""Rows among which those of similar length are scored together."""
COLUMNS = ("input_ids", "attention_mask")


def score_dataset(
    model: Any, dataset: Dataset, *, batch_size: int = 8, cache_dir: str | Path | None = None, precision: str = "fp32"
) -> Dataset:
    """Return the dataset with a column ``reference_loss``: CE(theta_ref; t) of each token, aligned with ``input_ids``.

    Each row is one document and is scored by itself. Its first token, which nothing predicts, and tokens whose
    ``attention_mask`` is 0 get 0. All other tokens are scored, whatever ``labels`` says. Results are cached under the
    SHA-256 of the model's weights and of the tokens. In a job of several ranks all must call it; they share the rows,
    and ``cache_dir`` must be a folder that all of them see.

    Args:
        model: the frozen reference: a ``PreTrainedModel`` or ``PeftModel`` with whole weights, on the device that it is
            to run on; or a Hugging Face folder.
        dataset: has ``input_ids`` and perhaps ``attention_mask``.
        batch_size: rows per forward pass.
        cache_dir: folder of the results; None takes ``dualtok`` in the cache of datasets.
        precision: of a model that is given as a folder, ``fp32`` or ``bf16``.

    Raises:
        ConfigError: the model is no causal language model, or its weights are sharded over ranks.
        DataError: no ``input_ids``, a column ``reference_loss`` is there already, a row is empty, an ``attention_mask``
            has another length, a token is not in the model's vocabulary, or a loss is not finite.
    """
    _require_scorable(dataset)
    if isinstance(model, str | Path):
        model = load_causal_lm(model, precision=precision)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    causal_lm = causal_lm_of(model)
    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "dualtok"
    folder.mkdir(parents=True, exist_ok=True)
    weights = _weights_digest(causal_lm)
    ranks = ranks_of_job(causal_lm.device)
    tokens = dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])
    parts = [
        tokens.select(range(first, min(first + PART_ROWS, len(tokens)))) for first in range(0, len(tokens), PART_ROWS)
    ]
    files = [folder / f"{REFERENCE_LOSS}-{_part_digest(weights, part)}.arrow" for part in parts]

    def score_mine() -> None:
        starts = range(0, len(tokens), PART_ROWS)
        missing = [place for place in zip(parts, files, starts, strict=True) if not place[1].is_file()]
        for part, file, first in missing[ranks.rank :: ranks.world_size]:
            _score_part(causal_lm, part, file, first, batch_size)

    ranks.barrier()  # no rank may look for files that another one writes already
    ranks.together(score_mine)
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise DataError(
            f"{absent[0]}: not there, though another rank has scored it; give a cache_dir that all hosts see"
        )
    scored = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    return concatenate_datasets([dataset, scored], axis=1)


def _require_scorable(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise DataError(f"dataset: needs a datasets.Dataset with a length, got {type(dataset).__name__}")
    if "input_ids" not in dataset.column_names:
        raise DataError("dataset: no column input_ids; tokenize it first")
    if REFERENCE_LOSS in dataset.column_names:
        raise DataError(f"dataset: has a column {REFERENCE_LOSS} already; take it out with remove_columns first")
    if len(dataset) == 0:
        raise DataError("dataset: no rows")


def _score_part(causal_lm: PreTrainedModel, part: Dataset, file: Path, first: int, batch_size: int) -> None:
    def score(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return {REFERENCE_LOSS: _losses_of(causal_lm, rows, [first + index for index in indices], batch_size)}

    was_training = causal_lm.training
    causal_lm.eval()
    try:
        part.with_format(None).map(
            score,
            batched=True,
            with_indices=True,
            batch_size=SORTED_ROWS,
            remove_columns=part.column_names,
            features=Features({REFERENCE_LOSS: List(Value("float32"))}),
            cache_file_name=str(file),
            new_fingerprint=file.stem.rpartition("-")[2][:16],
            load_from_cache_file=False,
            desc=f"{REFERENCE_LOSS} of rows {first} to {first + len(part) - 1}",
        )
    finally:
        causal_lm.train(was_training)


@torch.no_grad()
def _losses_of(
    causal_lm: PreTrainedModel, rows: dict[str, list[Any]], numbers: list[int], batch_size: int
) -> list[list[float]]:
    """Return the losses of some rows, each with 0 at its first and its hidden tokens."""
    vocabulary = causal_lm.config.get_text_config().vocab_size
    ids, masks = rows["input_ids"], rows.get("attention_mask") or [None] * len(numbers)
    for row, mask, number in zip(ids, masks, numbers, strict=True):
        _check_row(row, mask, number, vocabulary)
    shown = [
        [i for i, on in enumerate(mask) if on] if mask else [*range(len(row))]
        for row, mask in zip(ids, masks, strict=True)
    ]
    found = [[0.0] * len(row) for row in ids]
    order = sorted(range(len(ids)), key=lambda index: len(shown[index]))
    collate = DualCollator()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([{"input_ids": [ids[index][i] for i in shown[index]]} for index in chosen])
        batch = {name: tensor.to(causal_lm.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in COLUMNS}
        losses = token_losses_of(causal_lm, inputs, batch["shift_labels"]).float().cpu()
        for index, of_row in zip(chosen, losses, strict=True):
            of_tokens = [0.0, *of_row[: len(shown[index]) - 1].tolist()]
            for i, loss in zip(shown[index], of_tokens, strict=True):
                found[index][i] = loss
            if not all(map(torch.isfinite, of_row)):
                raise DataError(
                    f"row {numbers[index]}: the reference gives a loss that is not finite; check its weights"
                )
    return found


def _check_row(row: list[int], mask: list[int] | None, number: int, vocabulary: int) -> None:
    if mask is not None and len(mask) != len(row):
        raise DataError(
            f"row {number}: {len(row)} input_ids and {len(mask)} values of attention_mask; tokenize it again"
        )
    if not row or (mask is not None and not any(mask)):
        raise DataError(f"row {number}: no tokens; remove empty rows first")
    if min(row) < 0 or max(row) >= vocabulary:
        wrong = next(token for token in row if not 0 <= token < vocabulary)
        raise DataError(
            f"row {number}: token {wrong} is not among the reference's {vocabulary}; reference and data need the same "
            "tokenizer"
        )


def _weights_digest(causal_lm: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's configuration and weights, buffers and adapters included."""
    whole = hashlib.sha256(causal_lm.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(causal_lm.state_dict().items()):
        if hasattr(tensor, "ds_id") or type(tensor).__name__ == "DTensor" or tensor.device.type == "meta":
            raise ConfigError("model: its weights are sharded over the ranks; score with a model that is loaded whole")
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _part_digest(weights: str, part: Dataset) -> str:
    """Return the SHA-256 of what the losses of a part's tokens depend on."""
    whole = hashlib.sha256(weights.encode())
    for column in part.column_names:
        whole.update(column.encode())
        for values in _values(part, column):
            whole.update(values)
    return whole.hexdigest()[:32]


def _values(part: Dataset, column: str) -> Iterator[bytes]:
    for rows in part.with_format("numpy", columns=[column]).iter(batch_size=SORTED_ROWS):
        for row in rows[column]:
            yield len(row).to_bytes(8, "little")
            yield row.astype("int64").tobytes()
