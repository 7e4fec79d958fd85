"""The ``README.md`` of an exported model: what it is, what trained it on what, and what an audit has found."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from dualtok.audit.report.cards.hugging_face import markdown_table, model_index
from dualtok.audit.report.data import AuditFigures
from dualtok.audit.report.gate import verdict_line
from dualtok.audit.report.write import load_report
from dualtok.commands.output import AUDIT_FILE, audit_folder
from dualtok.errors import ConfigError, DataError
from dualtok.files import write_text
from dualtok.reference.fingerprint import weights_digest
from dualtok.train.engines.dp_account import stated
from dualtok.train.folder import FACTS_FILE, START_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.audit.report.data import ModelAudit

CARD = "README.md"
MODEL_INDEX = "model-index"
NO_ROW = "\nNone of the rows is known to be of exactly this model's weights.\n"
PIPELINE = "text-generation"
DIGITS = 16
"""Of a digest that a card shows."""
SPLIT = re.compile(r"^\* data: .* \(split `([a-z_]+)`\)", re.MULTILINE)
NOT_INTERPOLATED = "* these are the trained weights, before `dualtok interpolate`: attacks can tell members\n"
"""Of the recipe ``dual_plus``, whose model is not to be released as it is."""


def write_card(run_dir: Path, run: dict[str, Any], step: int, folder: Path, *, adapter: bool) -> None:
    """Write the card of a run's export.

    Args:
        run_dir: the run's ``output_dir``.
        run: its settings.
        step: of the checkpoint.
        folder: the exported folder.
        adapter: whether it holds an adapter alone.
    """
    path = run_dir / START_FOLDER / FACTS_FILE
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures = _figures(run_dir)
    row = None if figures is None else _own_row(folder, figures)
    named = {
        "base_model": facts.get("base"),
        "license": facts.get("license"),
        "pipeline_tag": PIPELINE,
        "library_name": "peft" if adapter else "transformers",
        "tags": ["dualtok"],
        MODEL_INDEX: None if figures is None or row is None else model_index(run_dir.name, row, figures),
    }
    head = yaml.safe_dump({key: value for key, value in named.items() if value}, sort_keys=False)
    told = [*_paragraphs(run_dir, run, facts, step, adapter=adapter), *_audit(run_dir, figures, row)]
    write_text(folder / CARD, f"---\n{head}---\n\n{''.join(told)}")


def note_limit(folder: Path, how: str) -> None:
    """Say in the card of a model of ``dualtok interpolate``, if it has one of dualtok's, how the limit was kept to.

    Args:
        folder: the model's.
        how: in words.
    """
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "with dualtok\n" in card:
        line = f"* {how}\n"
        head, objective, rest = card.replace(NOT_INTERPOLATED, "").partition("with dualtok\n")
        rest = re.sub(r"\nThis model's weights are those of the row .*\n", NO_ROW, rest)
        write_text(path, f"{_without_figures(head)}{objective}{line}{rest}")


def _without_figures(head: str) -> str:
    """Return the beginning of a card without the metadata that are figures of the trained weights."""
    _, values, rest = head.split("---\n", 2)
    metadata = yaml.safe_load(values)
    if MODEL_INDEX not in metadata:
        return head
    kept = {key: value for key, value in metadata.items() if key != MODEL_INDEX}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False)}---\n{rest}"


def trained_on(blocks: str) -> str:
    """Return the line of a card by which an audit sees which prepared data the model has learned.

    Args:
        blocks: digest of all shards (:func:`dualtok.reference.fingerprint.blocks_digest`).
    """
    return f"* prepared data: blocks `{blocks[:DIGITS]}`\n"


def split_of_card(folder: Path, blocks: str) -> str | None:
    """Return the split of some prepared data that a model's card says it has learned; None if it does not say.

    Args:
        folder: the model's.
        blocks: digest of the data's shards.
    """
    path = folder / CARD
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = SPLIT.search(card)
    return found[1] if found is not None and trained_on(blocks) in card else None


def split_of_run(run_dir: Path, blocks: str) -> str | None:
    """Return the split of some prepared data that a training run has learned; None if it does not say."""
    path = run_dir / START_FOLDER / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(facts["split"]) if facts.get("blocks") == blocks else None


def _paragraphs(run_dir: Path, run: dict[str, Any], facts: dict[str, Any], step: int, *, adapter: bool) -> list[str]:
    base = facts.get("base")
    kind = "A LoRA" if run["model"].get("lora") else "An IA3"
    what = f"{kind} adapter for" if adapter else "Fine-tuned from"
    origin = f"{what} `{base}`." if base else "Trained from scratch."
    licence = f" The base's licence: {facts['license']}." if facts.get("license") else ""
    told = f"{facts['documents']:,} documents, {facts['tokens']:,} tokens" if "documents" in facts else "not recorded"
    paragraphs = [
        f"# {run_dir.name}\n\n{origin}{licence}\n\n",
        "## Training\n\n",
        f"* objective: `{run['objective']}`, {step} optimizer steps, with dualtok\n",
        f"* data: {told} (split `{facts.get('split', 'train')}`); the texts are not published with the model\n",
        *([trained_on(facts["blocks"])] if "blocks" in facts else []),
    ]
    if run["objective"] == "dual_plus":
        paragraphs.append(NOT_INTERPOLATED)
    if (privacy := stated(run_dir)) is not None:
        paragraphs.append(f"* differential privacy: {privacy}\n")
    return [*paragraphs, "\n## Audit\n\n"]


def _figures(run_dir: Path) -> AuditFigures | None:
    """Return what an audit in the same folder has found, if there is one that can be read."""
    try:
        return AuditFigures.model_validate_json((audit_folder(run_dir) / AUDIT_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def _own_row(folder: Path, figures: AuditFigures) -> ModelAudit | None:
    """Return the figures of the very weights in a folder, if they are among those that were audited."""
    try:
        digest = weights_digest(folder)
    except (ConfigError, OSError):  # an adapter alone
        return None
    return next((row for row in figures.models if figures.hashes.get(f"model {row.name}") == digest), None)


def _audit(run_dir: Path, figures: AuditFigures | None, row: ModelAudit | None) -> list[str]:
    """Return what an audit in the same folder has found; it may be of further models."""
    if figures is None:
        if (audit_folder(run_dir) / AUDIT_FILE).is_file():
            return [f"`{AUDIT_FILE}` of the run cannot be read.\n"]
        return ["Not audited when it was exported: nothing is known of what it gives away about its documents.\n"]
    settings = figures.settings
    return [
        f"Attacks on membership ({' against '.join(settings.sides_in_words)}), strongest of those tried, with ",
        f"{100 * settings.confidence:g} % intervals; an AUC of .5 is guessing:\n\n",
        markdown_table(figures.models),
        f"\nThis model's weights are those of the row `{row.name}`.\n" if row is not None else NO_ROW,
        *_gate(run_dir, figures),
    ]


def _gate(run_dir: Path, figures: AuditFigures) -> list[str]:
    """Return what a gate has said of these figures, if it was asked."""
    path = run_dir / "report" / "report.json"
    try:
        report = load_report(path)
    except DataError:
        return []
    return [f"\n{verdict_line(report.gate)}\n"] if report.gate is not None and report.rows == figures.models else []
