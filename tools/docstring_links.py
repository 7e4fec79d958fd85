"""What ``:func:`x``` and its kin in docstrings become on the pages of the API: links where the name has a page.

mkdocstrings reads docstrings as Markdown, which knows no such roles. mkdocs.yml names this file as an extension of
griffe.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from griffe import Extension, Function, NameResolutionError, Object

if TYPE_CHECKING:
    from griffe import Class

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`(~?)(\.?)([\w.]+)`")


def _link(found: re.Match[str], where: Object) -> str:
    shortened, relative, name = found.groups()
    target = _path_of(name, where, relative=bool(relative))
    shown = name.rpartition(".")[2] if shortened or relative else name
    # "optional": a name that has no page, such as a private one, is shown without a link.
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def _path_of(name: str, where: Object, *, relative: bool) -> str:
    """Return the dotted path of a name in a docstring; that of ``.crossfit.folds`` begins in the module's folder."""
    if relative:
        return f"{where.module.parent.path if where.module.parent else where.module.path}.{name}"
    try:
        first, dot, rest = name.partition(".")
        return f"{where.resolve(first)}{dot}{rest}"
    except NameResolutionError:
        return name


class DocstringLinks(Extension):
    """Turns roles into links in every docstring that is loaded."""

    def on_package(self, *, pkg: Object, **_: Any) -> None:
        """Rewrite all docstrings of a package, when every name is known."""
        _rewrite(pkg)


def _rewrite(where: Object | Class | Function) -> None:
    if where.docstring is not None:
        where.docstring.value = ROLE.sub(lambda found: _link(found, where), where.docstring.value)
    for member in where.members.values():
        if not member.is_alias:
            _rewrite(member)  # type: ignore[arg-type]
