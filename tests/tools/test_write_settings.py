"""docs/settings/ is what the classes of the settings give; and these say what they must."""

from __future__ import annotations

import pytest

from dualtok.config.old_names import KEYS
from dualtok.config.run import RULES
from tests.support import ROOT
from tools.write_settings import FOLDER, GUIDES, all_settings, pages

WRITTEN = pages()


def test_the_pages_are_what_the_classes_give() -> None:
    """After a change: python tools/write_settings.py."""
    assert sorted(path.name for path in FOLDER.glob("*.md")) == sorted(WRITTEN)
    for name, text in WRITTEN.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name
    assert FOLDER == ROOT / "docs" / "settings"


@pytest.mark.parametrize("setting", all_settings().values(), ids=lambda setting: setting.key)
def test_a_setting_has_a_meaning_and_a_number_a_unit(setting) -> None:
    assert setting.doc, "write a docstring below the field"
    assert not setting.is_number or setting.unit, "end the docstring with 'Unit: blocks.', or 'Unit: none.'"
    assert "Unit:" not in setting.doc


def test_every_section_has_a_page_that_names_its_guide() -> None:
    sections = {key for key, setting in all_settings().items() if setting.section is not None and "." not in key}
    assert sections == set(GUIDES)
    for section in sections:
        assert GUIDES[section] in WRITTEN[f"{section}.md"]


def test_types_defaults_units_and_bounds_are_told() -> None:
    assert "integer at least 1 · required · unit: blocks" in WRITTEN["train.md"]
    assert "`fp32` or `bf16` · default: `bf16`" in WRITTEN["train.md"]
    assert "list of 2 of number · default: `[0.9, 0.95]` · no unit" in WRITTEN["train.md"]
    assert "number above 0, at most 1 · default: `0.05` · unit: share, 0 to 1" in WRITTEN["audit.md"]
    assert "text, or list of text with at least 1 · default: `''`" in WRITTEN["interpolate.md"]


def test_old_names_and_errors_stand_with_their_setting() -> None:
    everything = "\n".join(WRITTEN.values())
    for old, new in KEYS.items():
        assert f"{old} is now called {new}" in WRITTEN[f"{new.partition('.')[0]}.md"]
    section = WRITTEN["goldfish.md"].partition("\n## ")[0]
    assert "goldfish: has no effect with objective <objective>; remove it (goldfish=null)" in section
    entry = WRITTEN["train.md"].partition("## `train.loss_memory_mib`")[2].partition("\n## ")[0]
    assert "train.loss_memory_mib: has no effect with loss_backend: <loss_backend>" in entry
    assert "* Has an effect with `reference.mode`: `cpu`." in WRITTEN["reference.md"]
    assert everything.count("Refused: ") > len(RULES)
