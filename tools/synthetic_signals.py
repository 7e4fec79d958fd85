"""Made-up signals of a model and of the attacker's reference, for benchmarks and simulations of the audit.

A token's losses under both are correlated, as of two models that read the same text. ``leak`` lowers the losses of
members under the audited model; at 0 nothing tells members from non-members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import AttackContext
from dualtok.audit.signals.signals import TOKEN_DTYPES, Signals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

VOCABULARY = 8192
FIRST_NON_MEMBER = 10**9
PART = 1 << 15
Part = tuple[Signals, AttackContext]


def audited_class(
    documents: int, *, members: bool, tokens: int = 100, seed: int = 0, leak: float = 0.1, first: int = 0
) -> Part:
    """Return the signals of documents of half to one and a half times ``tokens``, and what the attacker has.

    Args:
        documents: how many.
        members: which class.
        tokens: mean length.
        seed: of the model, and of the documents where they are drawn anew for each.
        leak: share by which members' losses are lower, on top of what the reference explains.
        first: number of the first document in its class.
    """
    draw = np.random.default_rng([seed, int(members), first])
    lengths = draw.integers(tokens // 2, tokens * 3 // 2 + 1, documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = first + np.arange(documents) + (0 if members else FIRST_NON_MEMBER)
    reference = _signals(draw, ids, offsets, draw.gamma(4.0, 0.75, offsets[-1]))
    loss = 0.7 * -reference.log_prob.astype(np.float64) + 0.3 * draw.gamma(4.0, 0.75, offsets[-1])
    target = _signals(draw, ids, offsets, loss * (1 - leak * 0.3 * members))
    return target, _context(draw, target, reference)


def audited_classes(documents: int, *, tokens: int = 100, seed: int = 0, leak: float = 0.1) -> tuple[Part, Part]:
    """Return :func:`audited_class` of so many members and of as many non-members."""
    pair = [audited_class(documents, members=members, tokens=tokens, seed=seed, leak=leak) for members in (True, False)]
    return pair[0], pair[1]


def context_of(signals: Signals, reference: Signals) -> AttackContext:
    """Return what the attacker has beside signals that were read from a file: made up as above."""
    return _context(np.random.default_rng(int(signals.document[0])), signals, reference)


def parts(documents: int, *, members: bool, tokens: int) -> Iterator[Part]:
    """Yield a class of many documents a part at a time."""
    for first in range(0, documents, PART):
        yield audited_class(min(PART, documents - first), members=members, tokens=tokens, first=first, leak=0.02)


def _signals(
    draw: np.random.Generator, document: NDArray[np.int64], offsets: NDArray[np.int64], loss: NDArray[np.float64]
) -> Signals:
    first = draw.random(len(loss)) < np.exp(-loss)
    values = {
        "log_prob": -loss.astype(np.float32),
        "rank": np.where(first, 0, draw.geometric(0.05, len(loss))).astype(np.int32),
        "top1": first,  # in place of the rank up to version 0.2.0, which bench_audit_statistics.py compares with
        "mean_log_prob": -draw.uniform(1, 6, len(loss)).astype(np.float32),
        "var_log_prob": draw.uniform(0.5, 4, len(loss)).astype(np.float32),
    }
    return Signals(document=document, offsets=offsets, **{name: values[name] for name in TOKEN_DTYPES})


def _context(draw: np.random.Generator, target: Signals, reference: Signals) -> AttackContext:
    ids = np.split(draw.integers(0, VOCABULARY, target.n_tokens), target.offsets[1:-1])
    documents = target.document.tolist()
    return AttackContext(
        reference=reference,
        zlib_bytes=dict(zip(documents, (3 * target.lengths + 20).tolist(), strict=True)),
        token_ids=dict(zip(documents, ids, strict=True)),
        frequencies=np.full(VOCABULARY, 1 / VOCABULARY),
    )
