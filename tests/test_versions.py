"""Versions that checkpoints, reports and the doctor tell."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tomllib
from typing import TYPE_CHECKING

import numpy as np

import dualtok
from dualtok.versions import code_digest, installed_versions
from tests.support import ROOT, succeed
from tests.support import dualtok as dualtok_command

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_what_is_installed_is_told_and_what_is_not_is_left_out() -> None:
    expected = {"python": platform.python_version(), "dualtok": dualtok.__version__, "numpy": np.__version__}
    assert installed_versions(["numpy", "no-such-package"]) == expected


def test_the_command_line_tells_its_version() -> None:
    assert succeed(dualtok_command("--version")) == f"dualtok {dualtok.__version__}\n"


def test_the_package_and_its_project_file_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dualtok.__version__ == project["version"]


def test_the_digest_of_the_code_depends_on_names_and_contents_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(files: dict[str, str]) -> str:
        root = tmp_path / "package"
        shutil.rmtree(root, ignore_errors=True)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        monkeypatch.setattr(dualtok, "__file__", str(root / "__init__.py"))
        return code_digest()

    files = {"__init__.py": "", "a/b.py": "x = 1\n", "a/notes.txt": "no code"}
    first = digest(files)
    whole = b"".join(
        name.encode() + b"\0" + hashlib.sha256(files[name].encode()).digest() for name in ("__init__.py", "a/b.py")
    )
    assert first == hashlib.sha256(whole).hexdigest()
    assert digest(files | {"a/notes.txt": "other"}) == first
    assert digest(files | {"a/b.py": "x = 2\n"}) != first
    assert digest({"__init__.py": "", "a/c.py": "x = 1\n"}) != first
