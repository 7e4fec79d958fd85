from __future__ import annotations

import numpy as np
import pytest
import torch

from dualtok.audit.signals.from_logits import kl_from_reference, token_signals
from dualtok.audit.signals.signals import TOKEN_DTYPES


def oracle(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """The definition, in float64, one token after the other."""
    out = {name: np.zeros(labels.shape) for name in TOKEN_DTYPES}
    for index in np.ndindex(*labels.shape):
        label = int(labels[index])
        if label == -100:
            continue
        z = logits[index].double().numpy()
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        p = np.exp(log_p)
        kept = p > 0
        mean = (p[kept] * log_p[kept]).sum()
        out["log_prob"][index] = log_p[label]
        out["rank"][index] = sum(other > log_p[label] for other in log_p.tolist())
        out["mean_log_prob"][index] = mean
        out["var_log_prob"][index] = (p[kept] * (log_p[kept] - mean) ** 2).sum()
    return out


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_token_signals_equal_a_float64_oracle(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 50, generator=generator) * scale
    labels = torch.randint(0, 50, (2, 9), generator=generator)
    labels[0, 3] = labels[1, 8] = -100
    labels[0, 0] = logits[0, 0].argmax()
    signals = token_signals(logits, labels, chunk_tokens=5)
    expected = oracle(logits, labels)
    for name, values in signals.items():
        assert values.dtype == (torch.int32 if name == "rank" else torch.float32)
        np.testing.assert_allclose(values.double().numpy(), expected[name], rtol=1e-4, atol=2e-6, err_msg=name)
    assert signals["rank"][0, 0] == 0
    assert not any(values[0, 3] for values in signals.values())


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_token_signals_do_not_depend_on_chunks_or_batches(chunk: int) -> None:
    logits = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(24).reshape(3, 8) % 20
    labels[1] = -100
    whole = token_signals(logits, labels)
    for row in range(3):
        part = token_signals(logits[row : row + 1], labels[row : row + 1], chunk_tokens=chunk)
        for name in TOKEN_DTYPES:
            assert torch.equal(part[name][0], whole[name][row]), name


def test_token_signals_stay_finite_for_masked_vocabulary_and_sure_predictions() -> None:
    logits = torch.full((1, 3, 5), -torch.inf)
    logits[0, 0, 2] = 7.0  # certain: log p = 0, no variance
    logits[0, 1, :2] = 0.0  # two equal tokens, the rest masked
    logits[0, 2] = torch.tensor([0.0, 200.0, 0.0, 0.0, 0.0])  # other probabilities underflow
    signals = token_signals(logits, torch.tensor([[2, 1, 0]]))
    ln2 = float(np.log(2))
    torch.testing.assert_close(signals["log_prob"], torch.tensor([[0.0, -ln2, -200.0]]))
    torch.testing.assert_close(signals["mean_log_prob"], torch.tensor([[0.0, -ln2, 0.0]]))
    torch.testing.assert_close(signals["var_log_prob"], torch.zeros(1, 3), atol=1e-12, rtol=0)
    assert signals["rank"].tolist() == [[0, 0, 1]]  # of equals none is likelier


def test_token_signals_read_bfloat16_in_float32_and_leave_no_graph() -> None:
    logits = torch.randn(1, 4, 30, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100]])
    low = logits.detach().bfloat16()
    signals = token_signals(low, labels)
    torch.testing.assert_close(signals["log_prob"], token_signals(low.float(), labels)["log_prob"], rtol=0, atol=0)
    assert not token_signals(logits, labels)["log_prob"].requires_grad
    with pytest.raises(ValueError, match="do not fit"):
        token_signals(logits, labels[:, :3])


def test_token_signals_without_any_label_are_zero() -> None:
    signals = token_signals(torch.randn(2, 3, 4), torch.full((2, 3), -100))
    assert all(values.shape == (2, 3) and not values.any() for values in signals.values())


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_a_large_vocabulary_and_shifted_logits_keep_their_digits(shift: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 6, 40_000, generator=generator)
    logits[0, 1, 7] = 18  # nearly sure: the variance is that of the others alone
    logits[0, 2, 7] = 6  # a gap as wide as its probability is small
    logits = (logits + shift).double().float()
    labels = torch.tensor([[3, 7, 8, 9, 10, 11]])
    expected = oracle(logits, labels)
    for name, values in token_signals(logits, labels).items():
        np.testing.assert_allclose(values.double().numpy(), expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_the_given_logits_are_left_as_they_were() -> None:
    logits, labels = torch.randn(1, 4, 9), torch.tensor([[1, 2, 3, 4]])
    before = logits.clone()
    token_signals(logits, labels)
    kl_from_reference(logits, logits, labels)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_kl_from_reference_equals_a_float64_oracle(chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randn(2, 5, 30, generator=generator) * scale for scale in (2.0, 4.0))
    labels = torch.randint(0, 30, (2, 5), generator=generator)
    labels[1, 2] = -100
    found = kl_from_reference(ours, theirs, labels, chunk_tokens=chunk)["kl_from_reference"]
    for index in np.ndindex(2, 5):
        q, p = (np.exp(logits[index].double().numpy()) for logits in (ours, theirs))
        q, p = q / q.sum(), p / p.sum()
        expected = 0.0 if labels[index] == -100 else sum(p * np.log(p / q))
        assert float(found[index]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (kl_from_reference(ours, theirs, labels)["kl_from_reference"] - found).abs().max() < 1e-5


def test_kl_is_0_between_equals_and_finite_for_a_masked_vocabulary() -> None:
    masked = torch.tensor([[[0.0, 0.0, -torch.inf], [300.0, 0.0, -torch.inf]]])
    labels = torch.tensor([[0, 1]])
    assert kl_from_reference(masked, masked, labels)["kl_from_reference"].tolist() == [[0.0, 0.0]]
    half = kl_from_reference(torch.tensor([[[3.0, -torch.inf, 3.0]] * 2]), masked, labels)["kl_from_reference"]
    assert half[0, 0] > 50, "the reference expects a token that the model excludes"
    assert half.isfinite().all()
    with pytest.raises(ValueError, match="do not fit"):
        kl_from_reference(masked, masked[..., :2], labels)
