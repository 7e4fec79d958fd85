"""A small prepared corpus of real text, made once per test process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import warm
from tests.skips import pytest_runtest_makereport  # noqa: F401  # a hook

ROOT = Path(__file__).resolve().parent.parent

# A test process may be a fork (below), and what starts Python by `sys.executable` shall start it anew.
sys.executable = os.environ.setdefault("DUALTOK_TESTS_PYTHON", sys.executable)
multiprocessing.set_executable(sys.executable)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub that cannot be reached is asked again and again
# Whoever starts pytest by itself gets what `make test` sets: else DeepSpeed would compile its operators anew, into a
# folder of its own, or because another `ninja` comes first than the one that compiled them.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

# The same examples in each run; a test that fails now and then tells nobody what to fix.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

LONGEST = (
    "commands/test_demo.py",
    "tools/test_reproduce_paper.py",
    "multi_rank/test_layout_parity.py",
    "tools/test_gpu_check.py",
    "faults/test_campaign.py",
    "doctor/test_hosts.py",
    "e2e/test_readme.py",
    "multi_rank/test_watch.py",
    "multi_rank/test_elastic_resume.py",
    "multi_rank/test_resume.py",
    "plan/test_ds_configs.py",
    "doctor/test_doctor.py",
    "tools/test_check_plan.py",
)
"""Files that take minutes; they begin first, so that no core is left idle at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Fork the processes that run tests from one that has imported what they need."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        warm.share()
        config.option.tx = [f"popen//python={warm.launcher()[0]}"] * len(config.option.tx)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by what they take: the longest, those with slow tests, the others."""
    place = {str(ROOT / "tests" / name): number for number, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: place.get(str(item.path), len(LONGEST) + (item.path not in slow)))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the ``data`` section of 300 prepared SOTU passages: blocks of 64 tokens, 512 ids, 8 lanes."""
    from tests.support import write_small_corpus

    return write_small_corpus(tmp_path_factory.mktemp("corpus"))
