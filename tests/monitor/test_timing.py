"""Each second of a step counts once, with the innermost phase; sleeps stand for work."""

from __future__ import annotations

import time
from itertools import islice

import pytest

from dualtok.monitor.timing import BACKWARD, COMMUNICATION, DATA, FORWARD, OTHER, PhaseTimer, StepTimes

NAP = 0.1
SLACK = 0.08
"""A sleep is at least as long as asked for, and on a busy machine somewhat longer."""


def near(seconds: float) -> object:
    return pytest.approx(seconds + SLACK / 2, abs=SLACK / 2 + 1e-4)


def slow_items(count: int) -> object:
    for number in range(count):
        time.sleep(NAP)
        yield number


def test_inner_phases_stop_the_clock_of_outer_ones() -> None:
    timer = PhaseTimer()
    with timer.step():
        with timer.phase(FORWARD):
            time.sleep(NAP)
            with timer.phase(COMMUNICATION), timer.phase(COMMUNICATION):  # a collective made of others
                time.sleep(2 * NAP)
            time.sleep(NAP)
        with timer.phase(COMMUNICATION):
            time.sleep(NAP)
        time.sleep(NAP)
    times = timer.take()
    assert times.steps == 1
    assert times.phases == {FORWARD: near(2 * NAP), COMMUNICATION: near(3 * NAP), OTHER: near(NAP)}
    assert sum(times.phases.values()) == pytest.approx(times.wall, abs=1e-9)
    assert times.busy == near(4 * NAP), "the collective within the forward pass belongs to the stage's work"


def test_what_an_iterator_takes_counts_and_its_use_does_not() -> None:
    timer = PhaseTimer()
    items = timer.each("reference", timer.each(DATA, slow_items(3)))
    next(items)  # between steps
    with timer.step():
        assert list(islice(items, 2)) == [1, 2]
        with timer.phase(BACKWARD):
            time.sleep(NAP)
        assert list(items) == []
    times = timer.take()
    assert times.phases[DATA] == near(2 * NAP)
    assert times.phases[BACKWARD] == near(NAP)
    assert times.phases["reference"] < SLACK


def test_steps_add_up_until_they_are_taken_and_phases_between_them_are_nobody_s() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer.step(), timer.phase(DATA):
            time.sleep(NAP)
        with timer.phase(DATA):
            time.sleep(5 * NAP)
    times = timer.take()
    assert (times.steps, times.phases[DATA]) == (2, near(2 * NAP))
    assert timer.take() == StepTimes()


def test_a_failed_step_leaves_the_timer_fit_for_the_next() -> None:
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer.step(), timer.phase(FORWARD):
        raise RuntimeError
    timer.take()
    with timer.step(), timer.phase(BACKWARD):
        time.sleep(NAP)
    assert timer.take().phases == {BACKWARD: near(NAP), OTHER: near(0)}
