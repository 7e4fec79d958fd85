from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import ROOT, environment, python, succeed


@pytest.mark.slow
def test_the_head_needs_a_fraction_of_the_plain_losss_memory() -> None:
    """The benchmark in miniature, with a budget in proportion."""
    sizes = ["--tokens", "1024", "--vocabulary", "32000", "--hidden", "64", "--memory-mib", "32"]
    output = succeed(
        subprocess.run(
            python("tools/bench_head.py", *sizes),
            env=environment(PYTHONPATH=str(ROOT)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    )
    found = re.search(r"dualtok / Hugging Face: ([\d.]+)", output)
    assert found, output
    assert float(found[1]) <= 1 / 8
