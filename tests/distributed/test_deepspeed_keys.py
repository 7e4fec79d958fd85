"""What is taken as ordinary without asking DeepSpeed is what DeepSpeed takes."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any

import pytest

from dualtok.distributed import deepspeed_keys
from dualtok.distributed.deepspeed_keys import AUTO, ORDINARY, SECTIONS, checked
from dualtok.errors import ConfigError

VALUES = (True, False, None, -1, 0, 1, 2, 3, 4, 5e8, 0.5, 2**60, "auto", "none", "cpu", "disk", "/nvme", [], {}, "0")


def paths(kinds: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, *rest) for name, kind in kinds.items() for rest in (paths(kind) if isinstance(kind, dict) else [()])]


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: nested(path[1:], value) if path[1:] else value}


CASES = [(section, path) for section, kinds in ORDINARY.items() for path in paths(kinds)]


@pytest.mark.parametrize(("section", "path"), CASES, ids=lambda part: part if isinstance(part, str) else ".".join(part))
def test_what_is_ordinary_is_right_to_deepspeed(section: str, path: tuple[str, ...]) -> None:
    module, name = SECTIONS[section]
    model = getattr(import_module(module), name)
    ordinary = 0
    for value, stage in product(VALUES, (0, 3)):
        given = nested(path, value)
        if section == "zero_optimization":
            given.setdefault("stage", stage)
        if deepspeed_keys._is_ordinary(given, ORDINARY[section]):
            ordinary += 1
            made: Any = model(**given)
            for step in path:
                names = {field.alias or known: known for known, field in type(made).model_fields.items()}
                made = getattr(made, names[step])
            assert made == value or str(made) == value
    assert ordinary >= 2


def test_the_ordinary_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_keys, "import_module", None)
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": True}}
    assert checked(config, "x.json") == config


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"reduce_bucket_size": 0}},
        {"zero_optimization": {"stge": 3}},
        {"zero_optimization": {"offload_param": {"device": "gpu"}}},
        {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
        {"bf16": {"enabled": "perhaps"}},
        {"bf16": True},
    ],
)
def test_what_is_wrong_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"x\.json"):
        checked(config, "x.json")


def test_auto_is_left_out_of_what_is_ordinary_too() -> None:
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": AUTO}, "bf16": {"enabled": AUTO}}
    assert checked(config, "x.json") == {"zero_optimization": {"stage": 2}, "bf16": {"enabled": AUTO}}
