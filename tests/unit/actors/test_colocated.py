"""Engines on shared devices sleep unless somebody generates."""

from collections.abc import Sequence
from typing import Any, cast

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.colocated import SleepMode, WakeForSync
from rlhf.actors.engine_group import EngineGroup
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.actors.waiting import RemoteCalls
from rlhf.engines.fakes import FakeRollout
from rlhf.errors import RewardError
from rlhf.types import SyncReport


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


def test_after_a_failed_evaluation_it_sleeps() -> None:
    """The run goes on, and models train next."""
    engine = FakeRollout(4)
    engine.sleep()
    mode = SleepMode(engine)
    with mode.awake():
        with pytest.raises(RewardError), mode.awake():
            raise RewardError("an environment failed")
        assert engine.awake, "somebody else generates"
    assert not engine.awake
    with pytest.raises(RewardError), mode.awake():
        raise RewardError("an environment failed")
    assert not engine.awake


def test_the_kv_cache_wakes_when_the_buckets_of_a_sync_are_gone() -> None:
    events: list[str] = []

    class Policy(WorkerGroup):
        def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
            events.append(phase)
            return [SyncReport(version=3, digest="", num_bytes=0, seconds=0.0, num_buckets=0, num_remote_calls=0)]

    class Pool:
        def __getattr__(self, name: str) -> Any:
            return lambda: events.append(name)

    none: Any = lambda *_: None  # noqa: E731
    policy = WakeForSync(
        Policy([], RemoteCalls()),
        engines=EngineGroup([], RemoteCalls(), end=none, start=none, connect=none),
        pool=lambda _group: cast(Any, Pool()),
        requests=[],
        step_timeout_s=1.0,
        sync_timeout_s=1.0,
    )
    assert policy.send_weights(3).version == 3
    assert events == ["wake_weights", "weight sync of version 3", "wake"]
