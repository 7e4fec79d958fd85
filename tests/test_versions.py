"""Versions that checkpoints, reports and the doctor tell."""

from __future__ import annotations

import platform
import tomllib

import numpy as np

import dualtok
from dualtok.versions import installed_versions
from tests.support import ROOT, succeed
from tests.support import dualtok as dualtok_command


def test_what_is_installed_is_told_and_what_is_not_is_left_out() -> None:
    expected = {"python": platform.python_version(), "dualtok": dualtok.__version__, "numpy": np.__version__}
    assert installed_versions(["numpy", "no-such-package"]) == expected


def test_the_command_line_tells_its_version() -> None:
    assert succeed(dualtok_command("--version")) == f"dualtok {dualtok.__version__}\n"


def test_the_package_and_its_project_file_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dualtok.__version__ == project["version"]
