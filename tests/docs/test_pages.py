"""What the documentation names must exist: pages, commands, modules, headings, rooms; and its examples must run."""

from __future__ import annotations

import ast
import configparser
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dualtok.cli import app
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```$|(`+)(?!`)(.+?)(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
VERB = re.compile(r"(?:^[ $]*|`|[|&] *|-m |module |[A-Z]=\S+ )dualtok +([a-z]\w*)", re.MULTILINE)
PATH = re.compile(r"(?<![\w./-])dualtok/(?:\w+/)*\w+(?:\.\w+)?(?![\w/])")
DOTTED = re.compile(r"(?<![\w./~-])dualtok(?:\.[A-Za-z_]\w*)+")


def newest(changelog: str) -> str:
    """Return a changelog's first section: earlier ones name what was there then."""
    return "## [".join(changelog.split("## [")[:2])


@cache
def texts() -> dict[str, str]:
    """Return all that describes dualtok as it is now, by its name."""
    found = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"]}
    return {**found, "CHANGELOG.md": newest((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))}


def code_of(text: str) -> list[str]:
    """Return the code of a page: its blocks, and what stands between backticks."""
    return [block or inline for block, _, inline in CODE.findall(text)]


def in_navigation(entries: list[Any]) -> list[str]:
    """Return the pages of a navigation."""
    found = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += in_navigation(target) if isinstance(target, list) else [target]
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(in_navigation(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_command_in_the_documentation_is_one() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if not command.hidden}
    named = {
        (name, verb)
        for name, text in texts().items()
        for code in code_of(text)
        for verb in VERB.findall(code)
        if name != "CHANGELOG.md" or verb != "retreat"  # it tells of the change of that name
    }
    assert verbs <= {verb for _, verb in named}, "the pattern finds commands"
    assert sorted((name, verb) for name, verb in named if verb not in verbs) == []


@cache
def names_in(module: Path) -> dict[str, ast.AST]:
    """Return what a module defines or imports, by name."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def is_there(dotted: str) -> bool:
    """Return whether a dotted name is a package, a module, or a name in one; nothing is imported."""
    here, parts = ROOT, dotted.split(".")
    while parts and (here / parts[0]).is_dir():
        here /= parts.pop(0)
    module = here / f"{parts[0]}.py" if parts and (here / f"{parts[0]}.py").is_file() else here / "__init__.py"
    rest = parts[1:] if module.name != "__init__.py" else parts
    return module.is_file() and all(part in names_in(module) for part in rest)


def test_every_module_that_the_documentation_names_is_there() -> None:
    dotted = {(name, found) for name, text in texts().items() for found in DOTTED.findall(text)}
    paths = {(name, found) for name, text in texts().items() for found in PATH.findall(text)}
    assert len(dotted) > 50
    assert sorted(pair for pair in dotted if not is_there(pair[1])) == []
    assert sorted((name, path) for name, path in paths if not (ROOT / path).exists()) == []


def heading_ids(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?)(?: *\{[^}]*\})?$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_every_relative_link_leads_somewhere(name: str) -> None:
    """The links inside docs/ are checked by `mkdocs build --strict`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        page = ROOT / (path or name)
        if not page.exists() or (anchor and anchor not in heading_ids(page.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_the_page_of_the_architecture_lists_the_rooms_in_the_order_of_the_contract() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:rooms"]["layers"].split("\n")
    rooms = [re.split(r" [:|] ", layer.strip()) for layer in layers if layer.strip()]
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    listed = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)]
    assert [room for room in listed if room != ["input_ids"]][: len(rooms)] == rooms


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.stem)
def test_the_examples_of_the_api_run(
    page: Path, small_corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(small_corpus["dir"])
    for example in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if "dualtok.commands" in example:  # a whole training run: tests/commands has those
            names = re.findall(r"^from (\S+) import (\w+)$", example, re.MULTILINE)
            assert all(is_there(f"{module}.{name}") for module, name in names)
        else:
            exec(compile(example, str(page), "exec"), {})
