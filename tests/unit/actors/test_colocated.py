"""Engines on shared devices sleep unless somebody generates."""

import pytest

from rlhf.actors.colocated import SleepMode
from rlhf.engines.fakes import FakeRollout


def test_an_engine_is_awake_while_somebody_generates_only() -> None:
    engine = FakeRollout(4)
    mode = SleepMode(engine)
    engine.sleep()
    with mode.awake():
        assert engine.awake
    assert not engine.awake


def test_of_several_users_the_last_one_lets_it_sleep() -> None:
    engine = FakeRollout(4)
    engine.sleep()
    mode = SleepMode(engine)
    with mode.awake():
        with mode.awake():
            assert engine.awake
        assert engine.awake
    assert not engine.awake


def test_after_an_error_it_is_left_awake() -> None:
    """It may still be generating for somebody else, and the attempt ends."""
    engine = FakeRollout(4)
    engine.sleep()
    with pytest.raises(RuntimeError, match="gone"), SleepMode(engine).awake():
        raise RuntimeError("gone")
    assert engine.awake
