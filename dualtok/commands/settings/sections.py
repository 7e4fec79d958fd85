"""Which sections of a run file each verb reads: for its help."""

from __future__ import annotations

RUN = ("output_dir", "seed")
READS = {
    "prepare": ("data",),
    "train": ("data", "model", "train", "selection", "goldfish", "privacy", "reference", "monitor"),
    "score": ("data", "reference", "train"),
    "interpolate": ("data", "interpolate", "audit", "train"),
    "audit": ("data", "audit", "model", "train"),
    "report": ("audit",),
    "plan": ("data", "model", "train", "selection", "reference"),
    "launch": ("launch", "train"),
    "run": (
        "workflow",
        "data",
        "model",
        "train",
        "selection",
        "reference",
        "interpolate",
        "audit",
        "monitor",
        "launch",
    ),
}
"""Verb -> the sections that it reads; all of them read :data:`RUN` as well."""


def sections_of(verb: str) -> str:
    """Return the last line of a verb's help."""
    return (
        f"Reads the sections {', '.join(READS[verb])} of the run file; `dualtok settings SECTION` describes them, and "
        "section.key=value replaces a setting."
    )
