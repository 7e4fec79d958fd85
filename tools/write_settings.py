"""Write ``docs/settings/``: one page per section of a run's YAML, from the classes that read it.

python tools/write_settings.py
"""

from __future__ import annotations

from pathlib import Path

from dualtok.config.describe.fields import Setting, all_settings, default_line, doc_of, facts_of, settings_of, text_of
from dualtok.config.describe.notes import notes_of, old_names
from dualtok.config.run import RunConfig

__all__ = ["FOLDER", "GUIDES", "all_settings", "pages"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "settings"
GUIDES = {
    "data": "[Preparing data](../data.md)",
    "model": "[Training](../training.md)",
    "train": "[Training](../training.md), [Layouts](../layouts.md), [Checkpoints and faults](../checkpoints.md)",
    "selection": "[The method](../method.md)",
    "goldfish": "[The method](../method.md)",
    "privacy": "[DP-SGD](../dp_sgd.md)",
    "interpolate": "[dual_plus](../dual_plus.md)",
    "reference": "[The reference](../reference.md)",
    "audit": "[The audit](../audit.md)",
    "monitor": "[Monitoring](../monitoring.md)",
    "launch": "[Several hosts](../launch/index.md)",
    "workflow": "[The whole job](../run.md)",
}
"""Section -> the pages that explain it."""
INDEX = """\
# Settings

A run is one YAML file. These pages are written by `tools/write_settings.py` from the classes that read it.

```yaml
output_dir: runs/dual     # settings of the run itself
data:                     # a section
  dir: data
train:
  learning_rate: 1.0e-4
  guard: {on_nan: skip}   # a section of a section
```

On the command line `train.guard.on_nan=skip` replaces a setting of the file, and `selection=null` removes a section. An
unknown key, a value of the wrong type and a setting that has no effect in the chosen mode are errors, and nothing is
started. The errors that concern a setting stand below it, with `<...>` in the place of what differs from run to run.

A default that was taken from a paper or from another library says so. All others are dualtok's own choice.
"""
NAMES = """\
## Names used before 0.2

They are read with a note on standard error. A setting that is there under both names is an error.
"""


def pages() -> dict[str, str]:
    """Return the name and text of every page."""
    top = settings_of(RunConfig)
    sections = [setting for setting in top if setting.section is not None]
    index = [INDEX, "| section | what it holds |", "|---|---|", "| [the run itself](run.md) | what every verb needs |"]
    index += [f"| [`{setting.key}`]({setting.key}.md) | {text_of(setting.doc)} |" for setting in sections]
    index += ["", NAMES, *(f"* {note}" for note in map(text_of, old_names().values()))]
    run = ["# The run itself", "", doc_of(RunConfig), ""]
    run += [line for setting in top if setting.section is None for line in _entry(setting, 2)]
    written = {"index.md": index, "run.md": run}
    for setting in sections:
        guide = f"Explained in: {GUIDES[setting.key]}."
        written[f"{setting.key}.md"] = [f"# {setting.key}", "", *_section(setting, 1), guide, "", *_inside(setting, 2)]
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in written.items()}


def _inside(section: Setting, level: int) -> list[str]:
    """Return the entries of a section: its values, then the sections in it with theirs."""
    inner = settings_of(section.section, f"{section.key}.")
    lines = [line for setting in inner for line in _entry(setting, level)]
    for setting in inner:
        if setting.section is not None:
            lines += [f"{'#' * level} The section `{setting.key}`", "", *_section(setting, level)]
            lines += _inside(setting, level + 1)
    return lines


def _section(section: Setting, level: int) -> list[str]:
    lines = [doc_of(section.section), ""]
    return lines if level > 1 else [*lines, f"{default_line(section).capitalize()}.", "", *_notes(section.key)]


def _entry(setting: Setting, level: int) -> list[str]:
    heading = f"{'#' * level} `{setting.key}` {{ #{setting.key} }}"
    return [heading, "", facts_of(setting), "", text_of(setting.doc), "", *_notes(setting.key)]


def _notes(key: str) -> list[str]:
    """Return the notes of a setting as the lines of a list."""
    notes = notes_of(key)
    return [*(f"* {note}" for note in notes), ""] if notes else []


def main() -> None:
    """Write every page, and remove those of sections that are gone."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
