"""Figures that an audit wrote before 0.2, read under the present names."""

from __future__ import annotations

from typing import Any

KEYS = {"passes": "reruns", "neighbours": "neighbors", "neighbour_share": "neighbor_share", "memorised": "memorized"}
VALUES = {"neighbourhood": "neighborhood", "Neighbours": "Neighbors", "probe": "auxiliary"}
"""Names of attacks, their labels, and of splits."""
SECTIONS = ("settings", "models", "rows", "selection")
"""Parts of a file that hold such names; texts of configurations and versions stay as they were."""


def with_new_names(content: Any) -> Any:
    """Return the content of an ``audit.json`` or ``report.json``, nested as JSON is, with the present names."""
    if not isinstance(content, dict):
        return content
    return {key: _renamed(value) if key in SECTIONS else value for key, value in content.items()}


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {VALUES.get(key, KEYS.get(key, key)): _renamed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner) for inner in value]
    return VALUES.get(value, value) if isinstance(value, str) else value
