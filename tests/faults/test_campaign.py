"""Whatever strikes, a run that is started again ends as the undisturbed one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.harness import KINDS, Campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seed", "kinds"), [(1, KINDS[:-1]), (2, ("remote", "kill"))])
def test_a_run_under_faults_ends_as_the_undisturbed_one(
    small_corpus: dict[str, Any], tmp_path: Path, seed: int, kinds: tuple[str, ...]
) -> None:
    campaign = Campaign(tmp_path, small_corpus, seed=seed, faults=3, kinds=kinds)
    campaign.carry_out()  # asserts after each fault, and at the end
    assert len(campaign.log) == 3
