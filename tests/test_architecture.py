"""The house rules that no single module can keep: sizes, contracts between rooms, and where imports may hide."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dualtok"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_folders_files_and_functions_stay_small() -> None:
    folders = {folder: len(list(folder.glob("*.py"))) for folder in {module.parent for module in MODULES}}
    assert {folder: count for folder, count in folders.items() if count > 14} == {}
    lengths = {module: len(module.read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > 400} == {}
    functions = {
        f"{module.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in functions.items() if length > 60} == {}


def test_an_import_inside_a_function_has_a_comment_that_says_what_it_saves() -> None:
    names = {"sklearn": "scikit-learn", "deepspeed": "DeepSpeed", "tensorboard": "TensorBoard"}
    unexplained = []
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        lines = text.splitlines()
        reasons = re.findall(r"^# Imported where they are used(?:.*\n)(?:#.*\n)*", text, re.MULTILINE)
        for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
            hidden = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            for node in hidden:
                name = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
                package = "tensorboard" if "tensorboard" in name else name.partition(".")[0]
                explained = any(names.get(package, package) in reason for reason in reasons)
                near = lines[hidden[0].lineno - 2 : node.lineno]
                if not explained and not any("#" in line for line in near):
                    unexplained.append(f"{module.relative_to(ROOT)}:{node.lineno} {name}")
    assert unexplained == []


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("dualtok/data/folds.py", "import dualtok.train.loop", "Imports point down the order of rooms"),
        ("dualtok/monitor/timing.py", "from dualtok.monitor import progress", ""),
        ("dualtok/data/manifest.py", "from dualtok.data import folder", "No circle, in any folder"),
        ("dualtok/objective/selection.py", "import dualtok.files", "objective/ knows no rank"),
        ("dualtok/objective/loss.py", "import transformers", "objective/ knows no rank"),
        ("dualtok/audit/attacks/lira.py", "import deepspeed", "audit/ knows no rank"),
        (
            "dualtok/audit/statistics/metrics.py",
            "import dualtok.files",
            "Attacks and statistics read and write no file",
        ),
        ("dualtok/model/load.py", "import deepspeed", "DeepSpeed is imported under train/ and distributed/ alone"),
        ("dualtok/new_room.py", "", "Imports point down the order of rooms"),
    ],
)
def test_the_contracts_fail_when_a_file_is_put_against_them(
    tmp_path: Path, module: str, line: str, contract: str
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "dualtok", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    broken = [name.partition("BROKEN")[0] for name in ended.stdout.splitlines() if "BROKEN" in name]
    assert ended.returncode == (1 if contract else 0), ended.stdout
    assert bool(contract) == any(name.startswith(contract) for name in broken if contract), ended.stdout
