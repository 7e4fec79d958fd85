"""What becomes of skipped tests when none may be."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support import ROOT, environment

if TYPE_CHECKING:
    from pathlib import Path

CASES = """
import pytest

@pytest.mark.skipif(True, reason="not installed: slurmd")
def test_by_mark(): ...

def test_by_call():
    pytest.skip("not installed: libaio-dev")

@pytest.mark.optional
@pytest.mark.skipif(True, reason="no reader to compare with")
def test_optional(): ...

@pytest.mark.xfail(reason="known")
def test_known(): assert False

def test_run(): ...
"""


def test_skips_fail_where_all_tests_are_required(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = optional\n")
    said = {}
    for required, workers in (("", []), ("1", ["-n", "1"])):  # with xdist, as make does it
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-rfs",
                "-p",
                "tests.skips",
                "-p",
                "no:cacheprovider",
                *workers,
                str(tmp_path),
            ],
            env=environment(DUALTOK_REQUIRE_ALL=required, PYTHONPATH=str(ROOT)),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said[required] = (done.returncode, done.stdout)
    assert said[""][0] == 0
    assert "1 passed, 3 skipped, 1 xfailed" in said[""][1]
    status, output = said["1"]
    assert status == 1
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error" in output  # a mark skips before the test itself
    for words in ("slurmd", "libaio-dev"):
        assert f"not installed: {words}; DUALTOK_REQUIRE_ALL lets no test be left out" in output
