"""The collator keeps each token, its label and its reference loss together."""

from __future__ import annotations

from typing import Any

import pytest

from dualtok.errors import DataError
from dualtok.integrations.transformers import DualCollator

A = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "reference_loss": [0.0, 0.5, 0.25]}
B = {"input_ids": [8, 9], "labels": [8, 9], "reference_loss": [0.0, 2.0]}


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_examples_are_padded() -> None:
    assert as_lists(DualCollator(pad_token_id=3, pad_to_multiple_of=4)([A, B])) == {
        "input_ids": [[5, 6, 7, 3], [8, 9, 3, 3]],
        "labels": [[-100, 6, 7, -100], [-100, 9, -100, -100]],
        "shift_labels": [[6, 7, -100, -100], [9, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "reference_loss": [[0.0, 0.5, 0.25, 0.0], [0.0, 2.0, 0.0, 0.0]],
    }


def test_examples_are_packed_and_no_token_predicts_the_next_example() -> None:
    assert as_lists(DualCollator(pad_token_id=3, pack_to=6)([B, A])) == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],
        "shift_labels": [[6, 7, -100, 9, -100]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "reference_loss": [[0.0, 0.5, 0.25, 0.0, 2.0]],
    }


def test_hidden_tokens_go_and_the_masks_of_trl_hide_labels() -> None:
    left = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "reference_loss": [0.0, 0.0, 0.0, 1.5]}
    batch = as_lists(DualCollator()([left]))
    assert batch["input_ids"] == [[5, 6]]
    assert batch["labels"] == [[-100, 6]]
    assert batch["reference_loss"] == [[0.0, 1.5]]
    chat = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    assert as_lists(DualCollator()([chat]))["labels"] == [[-100, -100, 7]]


def test_blocks_that_are_packed_already_keep_their_documents() -> None:
    block = {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}
    batch = as_lists(DualCollator()([block]))
    assert batch["labels"] == [[-100, 6, -100, 8]]
    assert batch["position_ids"] == [[0, 1, 0, 1]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference_loss": [0.0, 1.0]}, "example 1 of the batch: 3 input_ids and 2 values of reference_loss; run"),
        ({"labels": [1]}, "3 input_ids and 1 values of labels"),
        ({"reference_loss": [0.0, float("nan"), 1.0]}, "reference_loss of token 1 is nan"),
        ({"labels": [6, 7, -100]}, "token 1 is 6, its label 7; .*not shifted"),
        ({"reference_loss": None}, "only some examples of a batch have it"),
        ({"input_ids": []}, "0 input_ids and 3 values"),
    ],
)
def test_examples_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        DualCollator()([B, {**A, **changes}])


def test_an_example_too_long_for_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="an example has 3 tokens, more than pack_to: 2"):
        DualCollator(pack_to=2)([A, B])


def test_nan_where_nothing_is_predicted_is_no_error() -> None:
    prompt = {**A, "labels": [-100, -100, 7], "reference_loss": [float("nan"), float("nan"), 1.0]}
    assert DualCollator()([prompt])["shift_labels"].tolist() == [[-100, 7, -100]]
