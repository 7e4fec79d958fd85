"""Examples of a dataset to a batch: padded, or packed into rows; the reference losses go with their tokens.

Legend: b batch, t position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dualtok.data.packing import pack
from dualtok.errors import DataError
from dualtok.integrations.transformers.token_losses import aligned_with_predictions
from dualtok.objective.head import IGNORED_LABEL

REFERENCE_LOSS = "reference_loss"
"""Column of a dataset: CE(theta_ref; t) of each token in nats, aligned with ``input_ids``; 0 for the first token."""
MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns that are 1 for the tokens to train on."""
RESCORE = "run score_dataset again, after everything that changes input_ids"


@dataclass(frozen=True)
class DualCollator:
    """Makes a batch of examples with ``input_ids`` and, as far as they have them, ``labels`` (aligned with
    ``input_ids``, the model's own tokens or -100), ``attention_mask``, ``position_ids`` and ``reference_loss``.

    The batch has ``input_ids``, ``labels`` and ``shift_labels`` (the token that each position predicts), [b, t] int64;
    ``reference_loss`` [b, t] float32, aligned with ``input_ids``; and ``attention_mask``, or for packed rows
    ``position_ids``. Tokens whose ``attention_mask`` is 0 are dropped before.
    """

    pad_token_id: int = 0
    """Id of the padding, which nothing is trained on."""

    pack_to: int | None = None
    """Pack the examples of a batch into rows of at most so many tokens, each example seeing itself alone: the model
    must take ``position_ids``. None pads each example to the longest. Unit: tokens."""

    pad_to_multiple_of: int = 1
    """Length of a batch, rounded up to a multiple of this. Unit: tokens."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch.

        Raises:
            DataError: an example's columns have different lengths, only some have reference losses, a reference loss is
                not finite, a label is neither its token nor -100, or an example is longer than ``pack_to``.
        """
        parts = [_columns(example, index) for index, example in enumerate(examples)]
        scored = [REFERENCE_LOSS in part for part in parts]
        if any(scored) and not all(scored):
            raise DataError(f"{REFERENCE_LOSS}: only some examples of a batch have it; {RESCORE}")
        packed = self.pack_to is not None or examples[0].get("position_ids") is not None
        rows = [[part] for part in parts] if self.pack_to is None else self._packed(parts, self.pack_to)
        length = max(sum(len(part["input_ids"]) for part in row) for row in rows)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fillings = {"input_ids": self.pad_token_id, "labels": IGNORED_LABEL}
        fillings |= {REFERENCE_LOSS: 0} if all(scored) else {}
        fillings |= {"position_ids": 0} if packed else {"attention_mask": 0}
        batch = {name: _filled(rows, name, length, filling) for name, filling in fillings.items()}
        if packed:
            for row, ids in zip(rows, batch["position_ids"], strict=True):  # the padding is a document of its own
                used = sum(len(part["input_ids"]) for part in row)
                ids[used:] = torch.arange(length - used)
        batch["shift_labels"] = aligned_with_predictions(batch["labels"], IGNORED_LABEL)
        return batch

    def _packed(self, parts: list[dict[str, np.ndarray]], capacity: int) -> list[list[dict[str, np.ndarray]]]:
        lengths = [len(part["input_ids"]) for part in parts]
        if max(lengths) > capacity:
            raise DataError(
                f"an example has {max(lengths)} tokens, more than pack_to: {capacity}; cut the examples before they "
                "are scored, or raise pack_to"
            )
        return [[parts[item] for item in items] for items in pack(lengths, capacity)]


def _columns(example: Mapping[str, Any], index: int) -> dict[str, np.ndarray]:
    """Return an example's columns without what its ``attention_mask`` hides, checked."""
    where = f"example {index} of the batch"
    if "input_ids" not in example:
        raise DataError(f"{where}: no input_ids; tokenize the dataset first")
    ids = np.asarray(example["input_ids"], dtype=np.int64)

    def column(name: str, dtype: type) -> np.ndarray | None:
        if example.get(name) is None:
            return None
        values: np.ndarray = np.asarray(example[name], dtype=dtype)
        if values.shape != ids.shape:
            advice = RESCORE if name == REFERENCE_LOSS else "each token needs one value"
            raise DataError(f"{where}: {len(ids)} input_ids and {len(values)} values of {name}; {advice}")
        return values

    labels, hidden = column("labels", np.int64), column("attention_mask", np.int64)
    shown = np.ones(len(ids), dtype=bool) if hidden is None else hidden.astype(bool)
    found = {
        "input_ids": ids,
        "labels": (ids if labels is None else labels).copy(),
        "attention_mask": np.ones_like(ids),
    }
    positions, reference = column("position_ids", np.int64), column(REFERENCE_LOSS, np.float32)
    for mask in (column(name, np.int64) for name in MASKS):
        if mask is not None:
            found["labels"][mask == 0] = IGNORED_LABEL
    if positions is not None:
        found["position_ids"] = positions
    if reference is not None:
        found[REFERENCE_LOSS] = reference
    found = {name: values[shown] for name, values in found.items()}
    if len(found["input_ids"]) == 0:
        raise DataError(f"{where}: no tokens; remove empty examples from the dataset")
    found.setdefault("position_ids", np.arange(len(found["input_ids"])))
    # Nothing predicts the first token of a document.
    found["labels"][0] = IGNORED_LABEL
    found["labels"][found["position_ids"] == 0] = IGNORED_LABEL
    if reference is not None:
        _check_reference(found, where)
    return found


def _check_reference(found: dict[str, np.ndarray], where: str) -> None:
    predicted = found["labels"] != IGNORED_LABEL
    broken = np.flatnonzero(predicted & ~np.isfinite(found[REFERENCE_LOSS]))
    if len(broken):
        raise DataError(
            f"{where}: {REFERENCE_LOSS} of token {broken[0]} is {found[REFERENCE_LOSS][broken[0]]}; "
            "check the reference model's weights, and run score_dataset again"
        )
    other = np.flatnonzero(predicted & (found["labels"] != found["input_ids"]))
    if len(other):
        raise DataError(
            f"{where}: token {other[0]} is {found['input_ids'][other[0]]}, its label {found['labels'][other[0]]}; "
            "reference losses are those of input_ids, so labels must be the same tokens or -100, and not shifted"
        )


def _filled(rows: list[list[dict[str, np.ndarray]]], name: str, length: int, filling: int) -> torch.Tensor:
    dtype = np.float32 if name == REFERENCE_LOSS else np.int64
    values = np.full((len(rows), length), filling, dtype=dtype)
    for row, parts in enumerate(rows):
        together = np.concatenate([part[name] for part in parts])
        values[row, : len(together)] = together
    return torch.from_numpy(values)
