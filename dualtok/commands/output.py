"""Where the verbs keep what they leave in a run's ``output_dir``."""

from __future__ import annotations

from pathlib import Path

AUDIT_FILE = "audit.json"
"""The audit's figures, in its folder."""


def audit_folder(output_dir: str | Path) -> Path:
    """Return where a run's audit is kept."""
    return Path(output_dir) / "audit"
