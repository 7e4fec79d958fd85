"""The command lines of ``dualtok settings`` and ``dualtok schema``, and the completion of settings."""

from __future__ import annotations

import json
from typing import Annotated

import typer

# Imported where they are used, for what they take to load: dualtok's classes of settings (pydantic, .3 s).


def complete_setting(incomplete: str) -> list[str]:
    """Return the settings that a shell may complete an override to; those of sections are not values."""
    from dualtok.config.describe.fields import all_settings

    found = [f"{key}=" for key, setting in all_settings().items() if setting.section is None]
    return [key for key in found if key.startswith(incomplete)]


def complete_section(incomplete: str) -> list[str]:
    """Return the sections and settings that a shell may complete a name to."""
    from dualtok.config.describe.fields import all_settings

    return [key for key in all_settings() if key.startswith(incomplete)]


def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            help="A section such as train, or one setting such as train.learning_rate.",
            show_default=False,
            autocompletion=complete_section,
        ),
    ] = None,
) -> None:
    """Describe the settings of a run file: meaning, type, default, unit, and the errors that concern them."""
    from dualtok.commands.settings.reference import reference

    typer.echo(reference(section))


def schema() -> None:
    """Print the JSON schema of a run file, with which editors complete and check it."""
    from dualtok.config.describe.schema import run_schema

    print(json.dumps(run_schema(), indent=1, ensure_ascii=False))
