from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dualtok.objective import GoldfishConfig, goldfish_loss, goldfish_mask

MODULUS = 2**64


def hash_of(window: list[int]) -> int:
    """The rolling hash in Python's own integers."""
    value = 0
    for token in window:
        value = (value + token + 1) * 0x9E3779B97F4A7C15 % MODULUS
        value = (value ^ (value >> 29)) * 0xFF51AFD7ED558CCD % MODULUS
    return value >> 16


def pack(rows: list[list[list[int]]], length: int) -> dict[str, torch.Tensor]:
    """Lay documents side by side, one list of documents a row, as the data room does; padding is a piece of its own."""
    batch = {
        name: torch.zeros(len(rows), length, dtype=torch.int64) for name in ("input_ids", "position_ids", "labels")
    }
    batch["labels"].fill_(-100)
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            here = slice(start, start + len(document))
            batch["input_ids"][row, here] = torch.tensor(document)
            batch["position_ids"][row, here] = torch.arange(len(document))
            batch["labels"][row, start : start + len(document) - 1] = torch.tensor(document[1:])
            start += len(document)
        batch["position_ids"][row, start:] = torch.arange(length - start)
    return batch


def random_document(seed: int, length: int, vocabulary: int = 1000) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


documents = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(documents, max_size=4), st.integers(1, 6), st.integers(2, 5))
def test_it_agrees_with_a_count_by_hand(row: list[list[int]], context: int, drop_every: int) -> None:
    batch = pack([row], 50)
    expected, start = torch.zeros(1, 50, dtype=torch.bool), 0
    for document in row:
        for index in range(1, len(document)):
            before = document[max(index - context, 0) : index]
            dropped = len(before) == context and hash_of(before) % drop_every == 0
            expected[0, start + index - 1] = not dropped
        start += len(document)
    torch.testing.assert_close(goldfish_mask(**batch, drop_every=drop_every, context=context), expected)


def test_large_token_ids_do_not_leave_the_hash() -> None:
    document = [2**31 - 1, 2**62, 0, 151_935, 2**63 - 1, 7] * 10
    kept = goldfish_mask(**pack([[document]], 60), context=3)
    by_hand = [index < 3 or hash_of(document[index - 3 : index]) % 4 != 0 for index in range(1, 60)]
    assert kept[0, :59].tolist() == by_hand
    assert not all(by_hand)


def test_a_document_loses_the_same_tokens_wherever_it_is_packed() -> None:
    document, other, third = random_document(1, 90), random_document(2, 37), random_document(3, 20)
    alone = goldfish_mask(**pack([[document]], 90))[0, :90]
    rows = [[document, other], [other, document], [third, other, document], [other, third, document]]
    batch = pack(rows, 160)
    kept = goldfish_mask(**batch)
    for row, start in enumerate((0, 37, 57, 57)):
        torch.testing.assert_close(kept[row, start : start + 90], alone)
    assert not alone[:-1].all(), "nothing was dropped"
    torch.testing.assert_close(goldfish_mask(**batch), kept, msg="another epoch drops other tokens")


def test_a_passage_loses_the_same_tokens_in_another_document() -> None:
    passage = random_document(4, 80)
    first = goldfish_mask(**pack([[passage]], 80))[0]
    second = goldfish_mask(**pack([[[5, 6, 7], [9, *passage]]], 90))[0, 4:84]
    torch.testing.assert_close(second[12:79], first[12:79])


@pytest.mark.parametrize(("drop_every", "context"), [(4, 13), (2, 13), (3, 1), (8, 4)])
def test_about_one_token_in_drop_every_is_dropped(drop_every: int, context: int) -> None:
    batch = pack([[random_document(seed, 2000, 50_000)] for seed in range(20)], 2000)
    kept = goldfish_mask(**batch, drop_every=drop_every, context=context)[:, context - 1 : -1]
    share, n = 1 - kept.float().mean().item(), kept.numel()
    deviation = (1 / drop_every * (1 - 1 / drop_every) / n) ** 0.5
    assert share == pytest.approx(1 / drop_every, abs=4 * deviation)


def test_neighboring_ids_are_told_apart() -> None:
    """A weak hash of one token, such as a product modulo a power of two, would follow the token's low bits."""
    documents = [[[token, 0]] for token in range(4096)]
    kept = goldfish_mask(**pack(documents, 2), drop_every=4, context=1)[:, 0]
    for step in (2, 4, 8, 16):
        for offset in range(step):
            assert 0.6 < kept[offset::step].float().mean().item() < 0.9


def test_the_order_of_the_preceding_tokens_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 100, (2000, 4), generator=generator)
    backwards = windows.flip(1)

    def kept(windows: torch.Tensor) -> torch.Tensor:
        return goldfish_mask(**pack([[[*w, 0]] for w in windows.tolist()], 5), drop_every=2, context=4)[:, 3]

    assert 0.4 < (kept(windows) == kept(backwards)).float().mean().item() < 0.6


def test_the_first_tokens_of_a_piece_are_never_dropped() -> None:
    rows = [[random_document(seed, 14), random_document(100 + seed, 14)] for seed in range(200)]
    kept = goldfish_mask(**pack(rows, 28), drop_every=2)
    for start in (0, 14):
        assert kept[:, start : start + 12].all()
        assert 0 < kept[:, start + 12].float().mean().item() < 1


def test_what_has_no_label_is_not_kept() -> None:
    batch = pack([[random_document(0, 30)]], 64)
    kept = goldfish_mask(**batch)
    assert not kept[batch["labels"] == -100].any()


def test_a_context_longer_than_the_block_drops_nothing() -> None:
    batch = pack([[random_document(0, 10)]], 10)
    torch.testing.assert_close(goldfish_mask(**batch, context=50), batch["labels"] != -100)


def test_dropped_tokens_take_no_gradient() -> None:
    batch = pack([[random_document(0, 60)], [random_document(1, 45)]], 60)
    token_loss = torch.rand(2, 60, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outcome = goldfish_loss(token_loss, **batch, drop_every=2)
    kept = goldfish_mask(**batch, drop_every=2)
    (gradient,) = torch.autograd.grad(outcome.loss, token_loss)
    torch.testing.assert_close(gradient, kept / kept.sum())
    assert outcome.weights.counts == (59 + 44, int(kept.sum()), 0)
    torch.testing.assert_close(outcome.weights.hard, kept)
    assert outcome.weights.totals[2, 1] == 59 + 44


def test_shapes_that_differ_are_refused() -> None:
    batch = pack([[[1, 2, 3]]], 8)
    with pytest.raises(ValueError, match=r"position_ids \(1, 7\)"):
        goldfish_mask(batch["input_ids"], batch["position_ids"][:, 1:], batch["labels"])
    with pytest.raises(ValueError, match=r"\(1, 8\).*\(2, 8\)"):
        goldfish_loss(torch.zeros(2, 8), **batch)


@pytest.mark.parametrize("change", [{"drop_every": 1}, {"drop_every": 0}, {"context": 0}])
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        GoldfishConfig(**change)
    with pytest.raises(ValueError, match=next(iter(change))):
        goldfish_mask(**pack([[[1, 2, 3]]], 8), **change)


def test_pydantic_reads_the_settings_strictly() -> None:
    read = TypeAdapter(GoldfishConfig).validate_python
    assert read({}) == GoldfishConfig(drop_every=4, context=13)
    with pytest.raises(ValidationError, match="drop_evry"):
        read({"drop_evry": 3})
