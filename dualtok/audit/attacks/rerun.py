"""Attacks that run each model again over changed texts: how the texts are changed, and what the answers say.

Scores are published as ratios and differences of log-likelihoods; with losses, which are their negatives, the ratios
are the same.

Legend: n documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualtok.audit.attacks.base import attack
from dualtok.audit.signals.reruns import Rerun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dualtok.audit.attacks.base import AttackContext, Scores
    from dualtok.audit.signals.reruns import Documents, Floats, Ids, RerunSettings, Scorer, Tools
    from dualtok.audit.signals.signals import Signals

CANDIDATES = 10
"""Likeliest other tokens that a neighbor's tokens are drawn from."""
LOSS_FLOOR = 1e-6
"""In nats: a model that is certain of every token has no loss to divide by."""


@attack(
    "lowercase",
    "Lowercase",
    "loss of the text in lower case divided by the text's (Carlini et al. 2021)",
    kind="rerun",
    needs=("lowercase",),
)
def lowercase_score(target: Signals, context: AttackContext) -> Scores:
    """Loss of the text in lower case divided by the loss of the text: the ratio of log-perplexities."""
    losses = context.rerun_for(target, "lowercase")
    return losses["lower_loss"] / np.maximum(losses["loss"], LOSS_FLOOR)


@attack(
    "recall",
    "ReCaLL",
    "log-likelihood after a prefix of non-members divided by that without (Xie et al. 2024)",
    kind="rerun",
    needs=("non_member_prefix",),
    settings=("prefix_documents", "prefix_share"),
)
def recall_score(target: Signals, context: AttackContext) -> Scores:
    """LL(x | non-members) / LL(x): non-members in front harm what the model knows by heart most."""
    losses = context.rerun_for(target, "non_member_prefix")
    return losses["conditional_loss"] / np.maximum(losses["loss"], LOSS_FLOOR)


@attack(
    "con_recall",
    "Con-ReCall",
    "log-likelihood after non-members minus gamma times that after members, divided by that without (Wang et al. "
    "2024, arXiv 2409.03363)",
    kind="rerun",
    needs=("member_prefix", "non_member_prefix"),
    settings=("prefix_documents", "prefix_share", "con_recall_gamma"),
)
def con_recall_score(target: Signals, context: AttackContext) -> Scores:
    """(LL(x | non-members) - gamma LL(x | members)) / LL(x)."""
    losses = context.rerun_for(target, "non_member_prefix")
    given_members = context.rerun_for(target, "member_prefix")["conditional_loss"]
    contrast = losses["conditional_loss"] - context.con_recall_gamma * given_members
    return contrast / np.maximum(losses["loss"], LOSS_FLOOR)


@attack(
    "neighborhood",
    "Neighbors",
    "mean loss of texts with some tokens replaced minus the loss (Mattern et al. 2023; the replacements are the "
    "audited model's own)",
    kind="rerun",
    needs=("neighbors",),
    settings=("neighbors", "neighbor_share"),
)
def neighborhood_score(target: Signals, context: AttackContext) -> Scores:
    """Mean loss of the neighbors minus the loss."""
    losses = context.rerun_for(target, "neighbors")
    return losses["neighbor_loss"] - losses["loss"]


@attack(
    "gradient_norm",
    "Grad norm",
    "minus the L2 norm of the gradient of the loss with respect to all parameters (Wang et al. 2024, arXiv 2402.17012)",
    kind="rerun",
    needs=("gradient",),
)
def gradient_norm_score(target: Signals, context: AttackContext) -> Scores:
    """Minus the norm of the gradient."""
    return -context.rerun_for(target, "gradient")["norm"]


def lowercase_rerun(scorer: Scorer | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each text and ``lower_loss`` of the same in lower case, each by its own tokens."""
    assert scorer is not None
    losses = _means(scorer.losses([*documents.tokens, *tools.lowercased(documents.tokens)]))
    n = len(documents.tokens)
    return {"loss": losses[:n], "lower_loss": losses[n:]}


def non_member_prefix_rerun(scorer: Scorer | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each document's first tokens, and their ``conditional_loss`` after non-members."""
    return _conditional(scorer, documents, tools, tools.prefixes["non_members"])


def member_prefix_rerun(scorer: Scorer | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each document's first tokens, and their ``conditional_loss`` after members."""
    return _conditional(scorer, documents, tools, tools.prefixes["members"])


def _conditional(scorer: Scorer | None, documents: Documents, tools: Tools, prefix: Ids) -> dict[str, Floats]:
    """Both means are over the same tokens: all but the first, which nothing predicts without a prefix."""
    assert scorer is not None
    head_length = tools.block_length - prefix_budget(tools.settings, tools.block_length)
    heads = [tokens[:head_length] for tokens in documents.tokens]
    begins = 0 if tools.bos is None else 1  # the prefix has begun already
    losses = scorer.losses([*heads, *(np.concatenate([prefix, head[begins:]]) for head in heads)])
    n = len(heads)
    after = [given[-(len(head) - 1) :] for head, given in zip(heads, losses[n:], strict=True)]
    return {"loss": _means(losses[:n]), "conditional_loss": _means(after)}


def neighborhood_rerun(scorer: Scorer | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return the mean ``loss`` of each document and ``neighbor_loss``, that of its neighbors on average."""
    assert scorer is not None
    originals = scorer.candidates(documents.tokens, CANDIDATES)
    neighbors: list[Ids] = []
    for number, tokens, original in zip(documents.numbers, documents.tokens, originals, strict=True):
        draw = np.random.default_rng([tools.seed, number])
        neighbors += _neighbors(tokens, original["other"], original["weight"], tools, draw)
    losses = _means(scorer.losses(neighbors))
    return {
        "loss": _means([original["loss"] for original in originals]),
        "neighbor_loss": losses.reshape(len(documents.tokens), tools.settings.neighbors).mean(axis=1),
    }


def _neighbors(
    tokens: Ids, other: NDArray[np.generic], weight: NDArray[np.generic], tools: Tools, draw: np.random.Generator
) -> list[Ids]:
    """Return copies of a document in which some tokens, never the first or the end token, are others."""
    positions = 1 + np.flatnonzero(tokens[1:] != tools.eos)
    replaced = min(len(positions), max(1, round(tools.settings.neighbor_share * len(positions))))
    copies = []
    for _ in range(tools.settings.neighbors):
        copy = tokens.copy()
        for position in draw.choice(positions, replaced, replace=False) if replaced else ():
            chances = weight[position - 1].astype(np.float64)
            copy[position] = draw.choice(other[position - 1], p=chances / chances.sum())
        copies.append(copy)
    return copies


def gradient_rerun(scorer: Scorer | None, documents: Documents, tools: Tools) -> dict[str, Floats]:
    """Return ``norm``, the L2 norm of the gradient of each document's mean loss with respect to all parameters."""
    assert tools.gradient_norm is not None
    return {"norm": np.array([tools.gradient_norm(tokens) for tokens in documents.tokens], dtype=np.float64)}


_PREFIX = ("prefix_documents", "prefix_share")
RERUNS = {
    each.name: each
    for each in (
        Rerun("lowercase", lowercase_rerun),
        Rerun("non_member_prefix", non_member_prefix_rerun, _PREFIX, prefix="non_members"),
        Rerun("member_prefix", member_prefix_rerun, _PREFIX, prefix="members"),
        Rerun("neighbors", neighborhood_rerun, ("neighbors", "neighbor_share")),
        Rerun("gradient", gradient_rerun, gradients=True),
    )
}
"""What the attacks of this file need, by the name that stands in :attr:`.Attack.needs`."""


def prefix_budget(settings: RerunSettings, block_length: int) -> int:
    """Return how many tokens of a block a prefix may take: two at least are left to a document."""
    return min(int(settings.prefix_share * block_length), block_length - 2)


def choose_prefix(lengths: Mapping[int, int], budget: int, limit: int, seed: int) -> list[int]:
    """Return the documents of a class that make its prefix, in random order.

    Args:
        lengths: document id -> its tokens.
        budget: no further document is taken once there are so many tokens.
        limit: most documents; half of the class at most are taken.
        seed: of the order.
    """
    order = np.random.default_rng(seed).permutation(np.array(sorted(lengths), dtype=np.int64)).tolist()
    chosen: list[int] = []
    for document in order[: min(limit, len(order) // 2)]:
        if sum(lengths[taken] for taken in chosen) >= budget:
            break
        chosen.append(document)
    return chosen


def join_prefix(documents: Sequence[Ids], budget: int, *, bos: int | None, eos: int) -> Ids:
    """Return the texts of documents one after another, without the tokens between them, cut to ``budget`` tokens."""
    texts = [
        tokens[tokens != eos] if bos is None else tokens[(tokens != eos) & (tokens != bos)] for tokens in documents
    ]
    begin = np.array([] if bos is None else [bos], dtype=np.int64)
    return np.concatenate([begin, *texts])[:budget]


def _means(losses: Sequence[NDArray[np.generic]]) -> Floats:
    return np.array([own.astype(np.float64).mean() for own in losses], dtype=np.float64)
