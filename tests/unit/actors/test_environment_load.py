"""How busy workers of tools and environments were."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from ray.exceptions import RayActorError

from rlhf.actors.calls import Worker
from rlhf.actors.environment_workers import WorkerSessions
from rlhf.environments.session import EnvironmentFaultError


class Handle:
    """Answers as a worker's handle: after `seconds`, or with an error."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self.ask = SimpleNamespace(remote=self._answer)
        self.ping = SimpleNamespace(remote=self._pong)
        self.close = SimpleNamespace(remote=self._pong)
        self._seconds, self._error = seconds, error

    async def _answer(self, *arguments: object) -> tuple[object, str]:
        await asyncio.sleep(self._seconds)
        if self._error is not None:
            raise self._error
        return None, ""

    async def _pong(self) -> None: ...


def worker(handle: Handle) -> Worker:
    return cast(Worker, SimpleNamespace(handle=handle, name="environment worker 0"))


def test_usage_counts_calls_episodes_and_lost_workers() -> None:
    async def use() -> list[dict[str, float]]:
        fresh = worker(Handle(0.0))
        lost = worker(Handle(0.0, RayActorError()))
        sessions = WorkerSessions([worker(Handle(0.4)), lost], lambda lost, error: fresh)
        for name in ("a", "b"):  # at the first worker, then at the other one
            session = sessions.session(name, alone=False)
            if name == "a":
                await session.open({})
            else:
                with pytest.raises(EnvironmentFaultError, match="died"):
                    await session.open({})
        used = [dict(sessions.usage()), dict(sessions.usage())]
        await sessions.close()
        return used

    first, then = asyncio.run(use())
    assert 0.3 < first["agent/worker_busy_share_max"] <= 1.0
    assert first["agent/worker_busy_share"] < first["agent/worker_busy_share_max"] * 0.75
    assert (first["agent/worker_episodes"], first["agent/worker_episodes_max"]) == (1.0, 1.0)
    assert first["agent/worker_restarts"] == 1.0
    assert set(then.values()) == {0.0}, "what was read is not read again"
