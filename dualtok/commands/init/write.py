"""A run file with comments: the settings that were chosen, and what each is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dualtok import __version__
from dualtok.config.describe.schema import run_schema
from dualtok.config.load import parse_run
from dualtok.errors import ConfigError
from dualtok.files import write_text

SCHEMA_FILE = "run.schema.json"
COMMENTS = {
    "output_dir": "models, logs and the report go here",
    "objective": "the dual loss; or dual_plus, goldfish, causal_lm (plain)",
    "workflow.plain": "train plainly as well, to compare with; false saves that time",
    "workflow.launcher": "none: one process; torchrun, deepspeed, slurm or mpi start ranks",
    "workflow.ranks": "one per GPU",
    "data.dir": "what is prepared goes here",
    "data.source": "a file or folder of text, JSON lines, CSV or Parquet, one document each",
    "data.block_length": "tokens per block; at most the model's context",
    "data.tokenizer": "the model's own",
    "data.vocab_size": "ids of a tokenizer that is trained on the split reference",
    "data.shares": "of the documents; members are train, non-members held_out",
    "model.path": "the pretrained model that is fine-tuned",
    "model.config": "a new model of this shape",
    "model.lora": "train low-rank adapters; remove it to train all weights",
    "model.activation_checkpointing": "less memory, about a third more computation",
    "train.learning_rate": "to begin with; the first setting to try others of",
    "train.batch_size": "blocks per step, over all ranks",
    "train.epochs": "passes over the split",
    "train.deepspeed": "the layout that `dualtok plan` found best",
    "train.precision": "bf16 on accelerators",
    "audit.fpr_targets": "false-positive rates that there are enough non-members for",
    "audit.models": "row of the report: the model's folder or name",
    "audit.members": "texts that the model was trained on",
    "audit.non_members": "texts of the same kind that it has never seen",
}
FLOW = ("data.shares", "model.config", "model.lora", "audit.fpr_targets", "audit.models", "train.pipeline")
"""Settings that are written on one line."""
WIDTH = 40
TAKEN = "{}: exists already, and is not overwritten; give another name with --out, or remove it"


def run_text(tree: dict[str, Any], about: str) -> str:
    """Return a run file.

    Args:
        tree: the settings.
        about: lines of comments for its top, without ``#``.
    """
    head = [f"# yaml-language-server: $schema={SCHEMA_FILE}"]
    head += [f"# {line}" for line in about.splitlines()]
    head += ["# All settings: `dualtok settings`. The whole job: `dualtok run` with this file.", ""]
    return "\n".join([*head, *_lines(tree, "", 0)]) + "\n"


def _lines(tree: dict[str, Any], prefix: str, depth: int) -> list[str]:
    lines = []
    for name, value in tree.items():
        key, indent = f"{prefix}{name}", "  " * depth
        comment = COMMENTS.get(key, "")
        if isinstance(value, dict) and key not in FLOW and not (key.startswith("audit.") and depth):
            lines.append(_commented(f"{indent}{name}:", comment))
            lines += _lines(value, f"{key}.", depth + 1)
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
        lines.append(_commented(f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}", comment))
    return lines


def _commented(line: str, comment: str) -> str:
    """Return a line with its comment: beside it, or above it where it is long."""
    if not comment:
        return line
    if len(line) < WIDTH:
        return f"{line.ljust(WIDTH)} # {comment}"
    indent = line[: len(line) - len(line.lstrip())]
    return f"{indent}# {comment}\n{line}"


def write_files(run_file: Path, text: str, files: dict[str, str]) -> list[Path]:
    """Write a run file, the schema and other files beside it; nothing is overwritten.

    Raises:
        ConfigError: a file is there already with other content.
    """
    parse_run(yaml.safe_load(text), source=str(run_file))
    schema = json.dumps(run_schema(), indent=1, ensure_ascii=False) + "\n"
    wanted = {run_file: text, **{Path(name): content for name, content in files.items()}}
    for path in wanted:
        if path.exists():
            raise ConfigError(
                f"{path}: exists already, and is not overwritten; give another name with --out, or remove it"
            )
    schema_file = run_file.parent / SCHEMA_FILE
    if schema_file.exists() and schema_file.read_text(encoding="utf-8") != schema:
        raise ConfigError(
            f"{schema_file}: exists already with other content, e.g. of another version than {__version__}; remove it"
        )
    for path, content in {**wanted, schema_file: schema}.items():
        write_text(path, content)
    return [*wanted, schema_file]
