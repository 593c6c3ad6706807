"""Engines in virtual time: what a stream of groups gains over batches where lengths have a long tail."""

import pytest

from benchmarks.stream import Cluster, batches, simulate

SMALL = Cluster(num_engines=4, slots=64, batch_size=256, num_steps=16)


def test_engines_never_wait_for_the_longest_response_where_steps_take_what_is_ready() -> None:
    found = simulate(SMALL, 2, "ready")
    assert found.busy > 0.95
    assert batches(SMALL, 2).busy < 0.2
    assert batches(SMALL, 0).step_time > 4 * found.step_time


def test_a_slow_engine_gets_less_and_holds_nobody_up() -> None:
    slow = Cluster(num_engines=4, slots=64, batch_size=256, num_steps=16, slow=0.5)
    assert simulate(slow, 2, "ready").busy > 0.92


@pytest.mark.parametrize("order", ["fifo", "ready"])
def test_without_lag_a_step_takes_as_long_as_its_longest_response_and_its_learning(order: str) -> None:
    """And so it is with batches: nothing is gained, and nothing is lost."""
    stream, batch = simulate(SMALL, 0, order), batches(SMALL, 0)
    assert stream.expired == 0.0
    assert stream.step_time == pytest.approx(batch.step_time, rel=0.25)
