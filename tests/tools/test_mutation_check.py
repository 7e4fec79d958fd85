"""The check of the tests by seeded faults: its table fits the sources, and it tells caught faults from survivors."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("mutation_check")


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_fits_the_sources_and_names_tests_that_exist(tool: Any) -> None:
    names = [fault.name for fault in tool.FAULTS]
    assert len(set(names)) == len(names) >= 64
    for fault in tool.FAULTS:
        assert fault.file.startswith("dualtok/"), fault.name
        changed = tool.mutated((ROOT / fault.file).read_text(encoding="utf-8"), fault)  # it occurs exactly once
        assert fault.old != fault.new, fault.name
        compile(changed, fault.file, "exec")
        assert fault.what, fault.name
        assert fault.tests, fault.name
        for test in fault.tests:
            file, _, function = test.partition("::")
            assert (ROOT / file).is_file(), fault.name
            assert not function or function.partition("[")[0] in functions(file), (fault.name, function)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # its tests need none, and begin sooner without
    root = tmp_path / "project"
    (root / "dualtok").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "dualtok" / "__init__.py").write_text("")
    (root / "dualtok" / "sums.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef less(a, b):\n    return a < b\n"
    )
    (root / "tests" / "test_sums.py").write_text(
        "from dualtok.sums import add, less\n\n\ndef test_add():\n    assert add(1, 2) == 3\n\n\n"
        "def test_less():\n    assert less(1, 2)\n"
    )
    return root


@pytest.mark.slow
def test_caught_faults_are_told_from_survivors(
    tool: Any, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*faults: Any, options: tuple[str, ...] = ()) -> tuple[int, str]:
        status = tool.main(["--timeout", "60", *options], root=project, faults=faults)
        said = capsys.readouterr()
        return status, said.out + said.err

    tests = ("tests/test_sums.py",)
    sign = tool.Fault("sign", "dualtok/sums.py", "a + b", "a - b", "the sign", tests)
    equal = tool.Fault("equal", "dualtok/sums.py", "a < b", "a <= b", "equal ones", tests)
    known = dataclasses.replace(equal, survives="never asked of equal ones")
    report = tmp_path / "report.json"

    status, said = run(sign, equal, options=("--json", str(report), "--jobs", "2"))
    assert status == 1
    assert "caught 1 of 2, survivors: equal" in said
    first, second = json.loads(report.read_text())
    assert (first["outcome"], first["by"]) == ("caught", "tests/test_sums.py::test_add")
    assert second["outcome"] == "survived"

    status, said = run(sign, known)
    assert status == 0
    assert "survivors: equal (accepted)" in said

    # Another suite: it sees the one and not the other.
    other = tmp_path / "other"
    (other / "tests").mkdir(parents=True)
    (other / "tests" / "test_sums.py").write_text(
        "from dualtok.sums import less\n\n\ndef test_less():\n    assert not less(2, 2)\n"
    )
    status, said = run(sign, equal, options=("--tests-from", str(other)))
    assert status == 1
    assert "caught 1 of 2, survivors: sign" in said

    broken = dataclasses.replace(sign, name="broken", new="a +")  # the tests cannot even be collected
    status, said = run(broken)
    assert status == 2
    assert "not judged: broken" in said
    assert "a + b" in (project / "dualtok" / "sums.py").read_text(), "the tree itself was changed"

    (project / "tests" / "test_sums.py").write_text("def test_wrong():\n    assert False\n")
    status, said = run(sign)
    assert status == 2
    assert "do not pass without a fault" in said
