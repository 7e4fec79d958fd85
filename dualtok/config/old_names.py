"""Settings that had another name before 0.2: run files with the old names work until 0.3."""

from __future__ import annotations

import copy
from typing import Any

from dualtok.errors import ConfigError

KEYS = {
    "retreat": "interpolate",
    "interpolate.stand_in": "interpolate.surrogate_reference",
    "selection.memorised_share": "selection.memorized_share",
    "model.quantise": "model.quantize",
    "audit.passes": "audit.reruns",
    "audit.reruns.neighbours": "audit.reruns.neighbors",
    "audit.reruns.neighbour_share": "audit.reruns.neighbor_share",
    "data.shares.probe": "data.shares.auxiliary",
}
"""Dotted key -> its new name; those of inner keys follow those of the section they are in."""
VALUES = {
    "audit.attacks": {"neighbourhood": "neighborhood"},
    "train.split": {"probe": "auxiliary"},
    "reference.splits": {"probe": "auxiliary"},
    "audit.members": {"probe": "auxiliary"},
    "audit.non_members": {"probe": "auxiliary"},
    "interpolate.members": {"probe": "auxiliary"},
    "interpolate.non_members": {"probe": "auxiliary"},
}
"""Dotted key (as it is named now) -> old value -> new value."""


def with_new_names(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a run's settings under their present names, and a line for each name that was an old one.

    Raises:
        ConfigError: a setting is there under both names.
    """
    tree, notes = copy.deepcopy(tree), []
    for old, new in KEYS.items():
        *parents, last = old.split(".")
        section, renamed = _section(tree, parents), new.rpartition(".")[2]
        if section is None or last not in section:
            continue
        if renamed in section:
            raise ConfigError(f"{new}: given twice, as {old} too, its name before 0.2; remove that")
        items = [(renamed if key == last else key, value) for key, value in section.items()]
        section.clear()
        section.update(items)
        notes.append(f"{old} is now called {new}; the old name works until 0.3")
    for key, values in VALUES.items():
        *parents, last = key.split(".")
        section = _section(tree, parents)
        given = None if section is None else section.get(last)
        if section is None or given is None:
            continue
        some = given if isinstance(given, list | tuple) else [given]
        for value in some:
            if isinstance(value, str) and value in values:
                notes.append(f"{key}: {value} is now called {values[value]}; the old name works until 0.3")
        changed = [values.get(value, value) if isinstance(value, str) else value for value in some]
        section[last] = changed if isinstance(given, list | tuple) else changed[0]
    return tree, notes


def _section(tree: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    here: Any = tree
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else None
