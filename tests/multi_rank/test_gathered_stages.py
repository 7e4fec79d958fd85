"""A sharded pipeline's stage gathers a module at a time, in the cool-down too, and not again what is to stay."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.plan.support import LLAMA
from tests.support import ROOT, command, environment, succeed

HIDDEN, HEADS = LLAMA["hidden_size"], 2 + 2 * LLAMA["num_key_value_heads"] / LLAMA["num_attention_heads"]
EMBEDDING = LLAMA["vocab_size"] * HIDDEN
LAYER = HEADS * HIDDEN**2 + 3 * HIDDEN * LLAMA["intermediate_size"] + 2 * HIDDEN


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two stages did."""
    folder = tmp_path_factory.mktemp("stages")
    succeed(
        subprocess.run(
            command("tests.multi_rank.gathered_stages", folder, ranks=2),
            env=environment(LOCAL_SIZE="2"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    )
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_stage_holds_little_more_than_the_module_at_work(stages: list[dict[str, Any]]) -> None:
    """The first stage's last two backward passes follow each other: what the first one gathered must be gone."""
    for stage in stages:
        found = stage["all released"]
        assert found["whole"] > EMBEDDING + 3 * LAYER
        assert found["most"] <= EMBEDDING + LAYER
    first = stages[0]["all released"]  # the last stage's head is gathered for each of its chunks
    assert first["times"] == first["passes"] * first["parameters"]


@pytest.mark.slow
def test_what_stays_gathered_is_gathered_by_the_step_alone(stages: list[dict[str, Any]]) -> None:
    some = stages[0]["small ones kept"]
    assert 0 < some["large"] < some["parameters"]
    assert some["times"] == some["passes"] * some["large"]
    for stage in stages:
        every = stage["all kept"]
        assert (every["times"], every["most"]) == (0, every["whole"])
