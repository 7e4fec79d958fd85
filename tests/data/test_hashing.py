"""The one mixing of numbers, against its published sequence."""

from __future__ import annotations

import warnings

import numpy as np

from dualtok.data.hashing import scrambled, split_mix

GAMMA = 0x9E3779B97F4A7C15
SEQUENCE_OF_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
"""What the generator returns from the state 0, as Java's SplittableRandom and Rust's rand_xoshiro do."""


def test_it_is_the_generators_sequence() -> None:
    states = np.array([(GAMMA * step) % 2**64 for step in range(4)], dtype=np.uint64)
    assert split_mix(states).tolist() == SEQUENCE_OF_0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(split_mix(states[1])) == SEQUENCE_OF_0[1], "a single number wraps around without a warning"


def test_the_last_part_alone_adds_nothing() -> None:
    assert scrambled(np.array([0, GAMMA], dtype=np.uint64)).tolist() == [0, SEQUENCE_OF_0[0]]
