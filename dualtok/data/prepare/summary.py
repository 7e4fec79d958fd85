"""What ``dualtok prepare`` says in the end: what was read, kept and left out, and what to look at again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtok.audit.statistics.passages import MOST_SHARED, PASSAGE_CHARACTERS
from dualtok.data.prepare.canaries import CANARIES
from dualtok.data.tokenizer_check import MOST_LOST

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dualtok.data.manifest import ChatEntry, Facts, Manifest

MOST_NAMED = 10
"""Files left out that are named."""


def summary(manifest: Manifest, unread: Sequence[str] = ()) -> str:
    """Return what was prepared, in a few lines.

    Args:
        manifest: of the folder.
        unread: files of the source that were not read, with the reason of each.
    """
    lines = [
        f"{manifest.documents_read:,} documents read; left out: {manifest.exact_duplicates:,} exact and "
        f"{manifest.near_duplicates:,} near duplicates, {manifest.too_short:,} too short, "
        f"{manifest.unused:,} in no split"
    ]
    for name, split in manifest.splits.items():
        fill = split.tokens / max(1, split.blocks * manifest.block_length)
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens in {split.blocks:,} blocks "
            f"({fill:.1%} full), {len(split.shards)} shards"
        )
    if manifest.canaries is not None:
        entry = manifest.canaries
        lines.append(f"  canaries: {entry.included:,} of {entry.count:,} are in train, as {CANARIES} tells")
        if entry.seen is not None:
            lines.append(f"  canaries' own tokens: each occurs at most {entry.seen:,} times in other documents")
    if manifest.chat is not None:
        lines.append(_chat_line(manifest, manifest.chat))
    if manifest.facts is not None:
        lines += _fact_lines(manifest, manifest.facts)
    lines += [f"    {line}" for line in unread[:MOST_NAMED]]
    if len(unread) > MOST_NAMED:
        lines.append(f"    and {len(unread) - MOST_NAMED:,} more")
    return "\n".join(lines)


def _chat_line(manifest: Manifest, chat: ChatEntry) -> str:
    """Return what is trained of the conversations."""
    tokens = sum(split.tokens for split in manifest.splits.values())
    trained = sum(split.predicted_tokens for split in manifest.splits.values())
    longer = f"; {chat.longer:,} are longer than a block, so that their later pieces lack what was said before"
    return (
        f"  {chat.conversations:,} documents are conversations (data.train_on: {chat.train_on}): {trained:,} of all "
        f"{tokens:,} tokens are trained ({trained / max(1, tokens):.1%}){longer if chat.longer else ''}"
    )


def _fact_lines(manifest: Manifest, facts: Facts) -> Iterator[str]:
    """Yield what the reader of a summary should know of the texts."""
    if facts.compared_by_characters:
        yield (
            f"  {facts.compared_by_characters:,} documents are in scripts without spaces: their near duplicates were "
            "found by n-grams of characters"
        )
    if facts.with_special_tokens:
        as_such = manifest.config.get("special_tokens_in_text") == "encode"
        became = "these tokens (data.special_tokens_in_text: encode)" if as_such else "ordinary pieces"
        yield f"  {facts.with_special_tokens:,} documents spell out a special token, which became {became}"
    if (number := sum(facts.lost.values())) and facts.sampled:
        share = number / facts.sampled
        kinds = ", ".join(f"{kind} in {count:,}" for kind, count in facts.lost.items())
        warning = "warning: " if share > MOST_LOST else ""
        yield f"  {warning}{share:.1%} of {facts.sampled:,} sampled documents do not come back from tokens: {kinds}"
    if facts.shared_passages is not None and facts.shared_passages > MOST_SHARED:
        threshold = manifest.config.get("near_duplicate_threshold")
        now = "near duplicates are kept now" if threshold is None else f"now {threshold:g}"
        yield (
            f"  warning: {facts.shared_passages:.1%} of held_out share a passage of {PASSAGE_CHARACTERS} characters "
            f"with train, which makes an audit doubtful: lower data.near_duplicate_threshold ({now}), or take what "
            "many documents repeat out of the texts"
        )
    if facts.left_out_files:
        yield f"  {facts.left_out_files:,} files of the source were not read:"
