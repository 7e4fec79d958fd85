"""`dualtok schema`: every run file of the repository keeps to it, and it refuses what loading refuses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

from dualtok.commands.demo import write_runs
from dualtok.config.describe.fields import all_settings
from dualtok.config.describe.schema import run_schema
from dualtok.config.load import parse_run
from dualtok.errors import ConfigError
from tests.support import ROOT, dualtok, succeed

if TYPE_CHECKING:
    from pathlib import Path


def without_required(schema: Any) -> Any:
    """Return a schema for parts of run files, in which nothing has to be there."""
    if isinstance(schema, dict):
        return {key: without_required(value) for key, value in schema.items() if key != "required"}
    return [without_required(value) for value in schema] if isinstance(schema, list) else schema


SCHEMA = run_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
PARTS = jsonschema.Draft202012Validator(without_required(SCHEMA))
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN: dict[str, Any] = {
    "data": {"dir": "data", "mix": [{"dir": "other", "weight": 0.2}]},
    "objective": "dual",
    "model": {"config": {"model_type": "llama"}, "lora": {"rank": 8, "targets": ["q_proj"]}},
    "reference": {"model": "models/reference"},
    "train": {"learning_rate": 1, "batch_size": 8, "steps": 4, "betas": [0.9, 0.95], "precision": "fp32"},
}


def documented() -> list[tuple[str, dict[str, Any]]]:
    """Return the YAML of the documentation that is of run files: of whole ones, and of parts."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            tree = yaml.safe_load(block.replace(", ...}", "}"))
            if isinstance(tree, dict) and set(tree) <= set(SCHEMA["properties"]):
                found.append((f"{page.relative_to(ROOT)}:{number}", tree))
    return found


DOCUMENTED = documented()
FILES = sorted((ROOT / "launch" / "runs").glob("*.yaml"))


def test_it_is_a_valid_schema_in_which_everything_is_described() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    classes = {setting.section.__name__ for setting in all_settings().values() if setting.section is not None}
    assert set(SCHEMA["$defs"]) == classes
    for record in (SCHEMA, *SCHEMA["$defs"].values()):
        assert record["description"]
        assert all(field["description"] for field in record["properties"].values())
        assert record["additionalProperties"] is False


def test_defaults_units_and_bounds_are_in_it() -> None:
    batch = SCHEMA["$defs"]["TrainConfig"]["properties"]["batch_size"]
    assert batch["minimum"] == 1
    assert batch["description"].endswith("Unit: blocks.")
    assert SCHEMA["$defs"]["TrainConfig"]["properties"]["precision"]["default"] == "bf16"
    assert SCHEMA["$defs"]["MonitorConfig"]["properties"]["hang_seconds"]["description"].endswith("Unit: seconds.")


def test_the_examples_are_many() -> None:
    assert len(DOCUMENTED) >= 15
    assert len(FILES) >= 5
    assert [name for name, tree in DOCUMENTED if "data" in tree and "train" in tree]


@pytest.mark.parametrize(("name", "tree"), DOCUMENTED, ids=[name for name, _ in DOCUMENTED])
def test_the_examples_of_the_documentation_keep_to_it(name: str, tree: dict[str, Any]) -> None:
    PARTS.validate(tree)
    try:
        parse_run(tree, source=name)
    except ConfigError:
        return  # a part of one
    VALIDATOR.validate(tree)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_the_run_files_of_the_repository_keep_to_it(file: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def test_the_demos_run_files_keep_to_it(tmp_path: Path) -> None:
    for run in write_runs(tmp_path).values():
        VALIDATOR.validate(run)


def test_an_audit_of_texts_needs_no_data() -> None:
    texts = {"members": {"source": "a.jsonl"}, "non_members": {"source": "b.jsonl"}}
    VALIDATOR.validate({"audit": {"models": {"m": "model"}, **texts}})
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({"audit": {"models": {"m": "model"}}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.learning_rat", 1),
        ("train.batch_size", 0),
        ("train.betas", [0.9]),
        ("train.precision", "fp16"),
        ("data.mix", [{"dir": "other", "weight": 2}]),
        ("model.lora", {"rank": "many"}),
        ("objective", "duel"),
        ("workflow", {"launcher": "ssh"}),
    ],
)
def test_what_loading_refuses_by_type_it_refuses_as_well(key: str, value: Any) -> None:
    tree = json.loads(json.dumps(RUN))
    VALIDATOR.validate(tree)
    parse_run(tree)
    *parents, last = key.split(".")
    section = tree
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(ConfigError):
        parse_run(tree)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(tree)


def test_the_command_prints_it() -> None:
    assert json.loads(succeed(dualtok("schema"))) == SCHEMA
