"""Engines on shared devices sleep but while they answer."""

import threading

import numpy as np
import pytest

from rlhf.actors.colocated import SleepingRolloutPool
from rlhf.engines.fakes import FakeRollout
from rlhf.types import PackedTokens, RolloutRequest, Sampling


def request(name: str) -> RolloutRequest:
    tokens = np.array([2], dtype=np.int64)
    return RolloutRequest(id=name, prompt_id="p", prompt_token_ids=tokens, seed=0, sampling=Sampling(max_tokens=2))


def test_an_engine_is_awake_while_it_answers_only() -> None:
    seen: list[bool] = []
    engine = FakeRollout(4, delay=lambda: seen.append(engine.awake))
    pool = SleepingRolloutPool(engine)
    engine.sleep()
    assert len(pool.generate([request("a")])) == 1
    assert seen == [True]
    assert not engine.awake
    tokens = PackedTokens(token_ids=np.array([2, 3], dtype=np.int64), lengths=np.array([2], dtype=np.int64))
    assert len(pool.score([tokens])) == 1
    assert not engine.awake


def test_of_several_calls_the_last_one_lets_it_sleep() -> None:
    both_in = threading.Barrier(3, timeout=10)
    first_may_go = threading.Event()
    turns: list[threading.Event] = [first_may_go, threading.Event()]
    order = iter(turns)

    def delay() -> None:
        turn = next(order)
        both_in.wait()
        assert turn.wait(10)

    engine = FakeRollout(4, delay=delay)
    engine.sleep()
    pool = SleepingRolloutPool(engine)
    threads = [threading.Thread(target=pool.generate, args=([request(name)],)) for name in "ab"]
    for thread in threads:
        thread.start()
    both_in.wait()
    first_may_go.set()
    while sum(thread.is_alive() for thread in threads) == 2:
        threads[0].join(0.01)
        threads[1].join(0.01)
    assert engine.awake
    turns[1].set()
    for thread in threads:
        thread.join(10)
    assert not engine.awake


def test_a_call_that_fails_is_the_error() -> None:
    def fail() -> None:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        SleepingRolloutPool(FakeRollout(4, delay=fail)).generate([request("a")])
