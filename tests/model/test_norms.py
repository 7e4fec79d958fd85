"""Norms of long vectors on host cores, where torch's own come out too small."""

from __future__ import annotations

import pytest
import torch

from dualtok.model.norms import row_norms, total_norm

LONG = 1 << 22


def exact(tensor: torch.Tensor) -> float:
    return float(sum(chunk.double().square().sum() for chunk in tensor.flatten().split(1 << 16)) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_vector_has_its_norm(dtype: torch.dtype) -> None:
    vector = torch.randn(LONG, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = exact(vector)
    assert float(total_norm([vector])) == pytest.approx(right, rel=1e-6)
    if dtype == torch.float32:
        assert abs(float(vector.norm()) / right - 1) > 1e-5, "torch is right by now: this module can go"


def test_several_tensors_are_one_vector() -> None:
    parts = [torch.full((3, 5), 2.0), torch.ones(4)[::2], torch.zeros(0)]
    assert float(total_norm(parts)) == pytest.approx((15 * 4 + 2) ** 0.5)
    assert float(total_norm([])) == 0.0
    assert total_norm(parts).dtype == torch.float32


def test_each_row_has_its_norm() -> None:
    rows = torch.randn(2, LONG // 1024, 1024, generator=torch.Generator().manual_seed(1))
    assert row_norms(rows).tolist() == pytest.approx([exact(row) for row in rows], rel=1e-6)
    assert abs(float(rows.reshape(2, -1).norm(2, dim=-1)[0]) / exact(rows[0]) - 1) > 1e-5, "torch is right by now"
    assert row_norms(rows[:0]).shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    assert not torch.isfinite(total_norm([torch.ones(3), torch.tensor([value])]))
