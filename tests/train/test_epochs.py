"""An epoch is an epoch: every document is seen as often as asked, to within one batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtok.config.train import TrainConfig
from dualtok.errors import ConfigError
from dualtok.train.checks import count_steps


def settings(batch_size: int, *, epochs: float | None = None, steps: int | None = None) -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, batch_size=batch_size, epochs=epochs, steps=steps)


@given(st.integers(1, 5000), st.integers(1, 500), st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0, 0.1]))
def test_all_blocks_are_seen_and_less_than_a_batch_beyond(blocks: int, batch: int, epochs: float) -> None:
    batch = min(batch, blocks)
    seen = count_steps(settings(batch, epochs=epochs), blocks) * batch
    assert epochs * blocks - 1e-6 <= seen < epochs * blocks + batch


@pytest.mark.parametrize(("batch", "epochs", "steps"), [(84, 1, 2), (119, 1, 1), (119, 2, 2), (60, 1, 2), (17, 0.1, 1)])
def test_the_last_batch_is_not_lost(batch: int, epochs: float, steps: int) -> None:
    assert count_steps(settings(batch, epochs=epochs), 119) == steps


@pytest.mark.parametrize("how", [{"epochs": 2.0}, {"steps": 5}])
def test_a_batch_above_the_data_is_refused(how: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: 512 blocks, but the split 'train' has 119"):
        count_steps(settings(512, **how), 119)  # type: ignore[arg-type]
