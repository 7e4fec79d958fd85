"""What the tests of the tools share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import ROOT

Module = Callable[[str], Any]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Return what imports a module of the tool, whose folder is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module
