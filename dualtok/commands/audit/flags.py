"""``dualtok audit --model ...``: the run that its flags describe, without a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dualtok.config.load import parse_with_overrides
from dualtok.errors import ConfigError
from dualtok.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.config.run import RunConfig

OUT = "runs/audit"
RUN_FILE = "audit.yaml"
NAMED = re.compile(r"([\w .+-]+)=(.+)")
"""``name=path``; a name has no slash, so that a path with an equals sign in a folder is none."""
SECTIONS = ("audit", "output_dir", "seed")
"""What of a run such an audit has to say."""


def run_of_flags(
    models: Sequence[str],
    overrides: Sequence[str],
    *,
    members: str | None,
    non_members: str | None,
    field: str | None = None,
    attack_reference: Sequence[str] | None = None,
    base: str | None = None,
    adapter: str | None = None,
    out: Path | None = None,
) -> RunConfig:
    """Return the audit that flags describe; relative paths stay relative.

    Args:
        models: ``MODEL`` or ``NAME=MODEL`` each.
        overrides: ``section.key=value`` each.
        members: file, folder or dataset of texts.
        non_members: likewise.
        field: key or column of the text in both.
        attack_reference: ``R`` or ``NAME=R`` each, R a folder, hub name or ``train:FILE``.
        base: folder or hub name.
        adapter: of the one model.
        out: the run's folder.

    Raises:
        ConfigError: a list is missing, two models have one name, or an override is malformed.
    """
    for flag, value in (("--members", members), ("--non-members", non_members)):
        if value is None:
            raise ConfigError(f"{flag}: missing; --model needs texts that it was trained on and others that it was not")
    wrong = next((text for text in overrides if "=" not in text), None)
    if wrong is not None:
        raise ConfigError(f"{wrong}: not a setting (section.key=value); with --model there is no run file")
    named = [_named(model) for model in models]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ConfigError(f"--model: two are called {max(names, key=names.count)!r}; name them: --model NAME=PATH")
    if adapter is not None and len(named) > 1:
        raise ConfigError("--adapter: with one --model alone; for several give each adapter's folder as a --model")
    sources = [{"source": source, **({} if field is None else {"field": field})} for source in (members, non_members)]
    audit = {
        "models": dict(named),
        "members": sources[0],
        "non_members": sources[1],
        "attack_reference": _references(attack_reference or ()),
        "base": base,
        "adapters": {} if adapter is None else {names[0]: adapter},
    }
    tree: dict[str, Any] = {"output_dir": str(out or OUT), "audit": audit}
    return parse_with_overrides(tree, list(overrides), source="dualtok audit")


def keep_run(run: RunConfig) -> Path:
    """Write the audit as a run file into its folder, and return that."""
    path = Path(run.output_dir) / RUN_FILE
    tree = {key: value for key, value in run.as_dict().items() if key in SECTIONS}
    write_text(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return path


def _references(given: Sequence[str]) -> str | dict[str, str] | None:
    """Return one reference without a name as it is, else name -> reference."""
    if not given:
        return None
    named = [(both[1], both[2]) if (both := NAMED.fullmatch(one)) is not None else (None, one) for one in given]
    if len(named) == 1 and named[0][0] is None:
        return named[0][1]
    return {name or f"reference {number}": one for number, (name, one) in enumerate(named, 1)}


def _named(model: str) -> tuple[str, str]:
    if (both := NAMED.fullmatch(model)) is not None and not Path(model).exists():
        return both[1], both[2]
    return Path(model).name or model, model
