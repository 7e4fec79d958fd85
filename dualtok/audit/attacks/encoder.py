"""LT-MIA's small encoder over the tokens of a document (Ilić et al. 2026, arXiv 2604.03199), taught by shadow models.

Its input is what one pass of the model and one of the attacker's reference leave of each token. The paper's has the 20
highest and lowest logits and the true token's rank beside it, which are not kept; its encoder is a transformer of two
layers with attention pooling, six times as wide, for a corpus of fine-tuned models. Here the shadows are of the audited
model's own recipe.

Legend: n documents, t tokens of a window, f columns, d width, k tokens of all documents.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dualtok.audit.signals.ragged import segment_mean
from dualtok.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import Scores
    from dualtok.audit.signals.signals import Signals

    Windows = tuple[NDArray[np.float32], NDArray[np.bool_]]
    """Columns of the tokens [n, t, f], 0 where there are none, and which there are [n, t]."""

WINDOW = 128
"""First tokens of a document that are looked at, as in the paper's code."""
MOST_SEQUENCES = 4096
"""Documents of all shadows together that the encoder learns from; of more, that many are drawn."""
WIDTH, HEADS, LAYERS, INNER, DROPOUT = 32, 4, 2, 64, 0.05
EPOCHS, BATCH, RATE, DECAY, SMOOTHING, CLIP = 10, 64, 1e-3, 0.028, 0.02, 1.0
"""Rate, weight decay, label smoothing and clipping are about the authors' (9.88e-4, .028, .02, 1); they train for 80
epochs on far more documents."""
HELD_OUT = 10
"""One document in so many chooses the epoch."""
CHUNK = 512
"""Documents that are scored at once."""


def windows(target: Signals, reference: Signals) -> Windows:
    """Return the first :data:`WINDOW` tokens of each document.

    Columns are, under model and reference, log p of the token, its mean and deviation over the vocabulary and whether
    the token is the likeliest one; s(t); and, the same for all tokens, the document's means and deviations of log p
    under either and of s(t).

    Args:
        target: signals of a model, each document with a predicted token.
        reference: the same of the attacker's reference, token by token aligned with them.
    """
    offsets, lengths = target.offsets, target.lengths
    columns: list[NDArray[Any]] = [reference.log_prob.astype(np.float64) - target.log_prob]
    for one in (target, reference):
        columns += [one.log_prob, one.mean_log_prob, np.sqrt(one.var_log_prob), one.top1]
    for values in (columns[0], columns[1], columns[5]):
        mean = np.repeat(segment_mean(values, offsets), lengths)
        columns += [mean, np.sqrt(np.repeat(segment_mean((values - mean) ** 2, offsets), lengths))]
    tokens_kf = np.stack([column.astype(np.float32) for column in columns], axis=1)
    place = np.arange(WINDOW)[None, :]
    mask = place < lengths[:, None]
    x = tokens_kf[np.where(mask, offsets[:-1, None] + place, 0)]
    x[~mask] = 0
    return x, mask


class Encoder(nn.Module):
    """A transformer over the tokens of a window, pooled by attention to one logit."""

    position_td: torch.Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(columns, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(DROPOUT))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, DROPOUT, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.weight = nn.Sequential(nn.Linear(WIDTH, WIDTH // 2), nn.Tanh(), nn.Linear(WIDTH // 2, 1))
        self.leave = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, 1))
        angle = torch.arange(WINDOW)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("position_td", torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(WINDOW, WIDTH))

    def forward(self, x_ntf: torch.Tensor, mask_nt: torch.Tensor) -> torch.Tensor:
        """Return the logit [n] of each document being a member; every document has a token."""
        longest = int(mask_nt.sum(dim=1).max())  # attention costs the square of the window
        x_ntf, mask_nt = x_ntf[:, :longest], mask_nt[:, :longest]
        x_ntd = self.layers(self.enter(x_ntf) + self.position_td[:longest], src_key_padding_mask=~mask_nt)
        weight_nt = self.weight(x_ntd).squeeze(-1).masked_fill(~mask_nt, -math.inf).softmax(dim=-1)
        logits: torch.Tensor = self.leave((weight_nt[..., None] * x_ntd).sum(dim=1)).squeeze(-1)
        return logits


@dataclass(frozen=True)
class LearnedEncoder:
    """A trained encoder with the scale of its input."""

    encoder: Encoder
    mean: torch.Tensor
    """Of each column over the training tokens [f]."""
    deviation: torch.Tensor

    def __call__(self, target: Signals, reference: Signals) -> Scores:
        """Return the logit [n] of each document being a member; see :func:`windows`."""
        parts = [np.zeros(0)]
        for first in range(0, target.n_documents, CHUNK):
            some = np.arange(first, min(first + CHUNK, target.n_documents))
            with torch.no_grad():
                logits = self.encoder(*_scaled(windows(target.take(some), reference.take(some)), self))
            parts.append(logits.double().numpy())
        return np.concatenate(parts)


def fit_encoder(shadows: Sequence[tuple[Windows, NDArray[np.bool_]]], seed: int) -> LearnedEncoder:
    """Teach an encoder, on the CPU, to tell the documents that a shadow learned from those that it did not.

    Of the epochs the one is kept whose loss on a tenth of the documents, which are not trained on, is smallest.

    Args:
        shadows: of each, some documents' :func:`windows` and whether it learned them [n].
        seed: of the weights and of the order.

    Raises:
        DataError: there are fewer than :data:`HELD_OUT` documents.
        ValueError: the shadows learned all the documents, or none.
    """
    x, mask = (np.concatenate([pair[part] for pair, _ in shadows]) for part in (0, 1))
    y = np.concatenate([inside for _, inside in shadows])
    if len(y) < HELD_OUT:
        raise DataError(
            f"audit.attacks: 'lt_mia' has {len(y)} documents of shadow models to learn from and needs {HELD_OUT}; "
            "leave it out, or audit more documents"
        )
    if y.all() or not y.any():
        raise ValueError(f"{len(y)} documents of shadow models, of which {np.count_nonzero(y)} were learned")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        present = torch.from_numpy(x[mask])
        learned = LearnedEncoder(Encoder(x.shape[2]), present.mean(dim=0), present.std(dim=0).clamp_min(1e-6))
        order = torch.randperm(len(y))
        x_ntf, mask_nt = _scaled((x, mask), learned)
        _train(learned.encoder, x_ntf, mask_nt, torch.from_numpy(y).float(), order)
    return learned


def _scaled(pair: Windows, learned: LearnedEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    x_ntf, mask_nt = (torch.from_numpy(array) for array in pair)
    return (x_ntf - learned.mean) / learned.deviation * mask_nt[..., None], mask_nt


def _train(encoder: Encoder, x: torch.Tensor, mask: torch.Tensor, y: torch.Tensor, order: torch.Tensor) -> None:
    judged, learned = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    parts = torch.split(judged, CHUNK)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * math.ceil(len(learned) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    smallest, best = math.inf, copy.deepcopy(encoder.state_dict())
    for _ in range(EPOCHS):
        encoder.train()
        for rows in torch.split(learned[torch.randperm(len(learned))], BATCH):
            smooth = y[rows] * (1 - SMOOTHING) + SMOOTHING / 2
            loss = nn.functional.binary_cross_entropy_with_logits(encoder(x[rows], mask[rows]), smooth)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
            optimizer.step()
            schedule.step()
        encoder.eval()
        with torch.no_grad():
            logits = torch.cat([encoder(x[rows], mask[rows]) for rows in parts])
            held_out = float(nn.functional.binary_cross_entropy_with_logits(logits, y[judged]))
        if held_out < smallest:
            smallest, best = held_out, copy.deepcopy(encoder.state_dict())
    encoder.load_state_dict(best)
    encoder.eval()


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a tenth of the steps upwards, then half a cosine down to 0."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))) / 2)
