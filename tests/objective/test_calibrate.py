from __future__ import annotations

import numpy as np
import pytest
import torch

from dualtok.objective import calibrated_loss
from tests.objective.support import random_losses


def test_it_is_the_model_minus_the_reference() -> None:
    token_loss, reference_loss = random_losses(0, (3, 5))
    expected = token_loss.detach().numpy().astype(np.float64) - reference_loss.numpy().astype(np.float64)
    np.testing.assert_allclose(calibrated_loss(token_loss, reference_loss).numpy(), expected, atol=1e-6)


def test_a_memorized_token_is_negative_and_a_hard_one_positive() -> None:
    s = calibrated_loss(torch.tensor([0.1, 5.0]), torch.tensor([4.0, 2.0]))
    assert s[0] < 0 < s[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_float32_and_detached_whatever_comes_in(dtype: torch.dtype) -> None:
    token_loss = torch.tensor([3.0, 1.0], dtype=dtype, requires_grad=True)
    s = calibrated_loss(token_loss, torch.tensor([0.001, 0.002], dtype=torch.float32))
    assert s.dtype == torch.float32
    assert not s.requires_grad
    # In bfloat16 the small reference losses would vanish beside the large ones.
    torch.testing.assert_close(s, torch.tensor([2.999, 0.998]), rtol=0, atol=1e-6)


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        calibrated_loss(torch.zeros(2, 3), torch.zeros(3, 2))


def test_a_shape_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match="must agree"):
        calibrated_loss(torch.zeros(2, 3), torch.zeros(3))
