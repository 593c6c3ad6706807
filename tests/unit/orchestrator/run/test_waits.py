"""Who is awaited, and for how long."""

import io
import time

import pytest

from rlhf.orchestrator.run.console import PlainConsole
from rlhf.orchestrator.run.live_console import LiveConsole
from rlhf.orchestrator.run.waits import WaitLines, Waits

pytestmark = pytest.mark.timeout(30)


class Clock:
    """A time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_oldest_wait_is_shown_with_its_age_and_stages() -> None:
    clock = Clock()
    waits = Waits(clock)
    stages = {"policy rank 0": "", "rollout engine 0": "importing"}
    waits.set("loading of models", ["policy rank 0", "rollout engine 0"], stages.__getitem__)
    clock.now += 7
    waits.set("start of processes", ["reward joy"])
    clock.now += 5
    assert waits.line() == "waiting for policy rank 0, rollout engine 0 (importing): loading of models, 12s"
    waits.set("loading of models", ["rollout engine 0"])
    clock.now += 60
    assert waits.line() == "waiting for rollout engine 0: loading of models, 1m12s", "its age is that of the whole wait"
    waits.set("loading of models", [])
    assert waits.line() == "waiting for reward joy: start of processes, 1m05s"
    waits.set("start of processes", [])
    assert waits.line() == ""


def test_short_waits_are_not_shown() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.set("learn", ["policy rank 0"])
    clock.now += 1.9
    assert waits.line() == ""
    clock.now += 0.2
    assert waits.line() == "waiting for policy rank 0: learn, 2s"
    assert waits.line(30.0) == ""


def test_many_workers_are_counted() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.set("loading of models", [f"policy rank {rank}" for rank in range(64)])
    clock.now += 3
    assert waits.line().startswith(
        "waiting for policy rank 0, policy rank 1, policy rank 2, policy rank 3 and 60 more:"
    )


def test_a_file_gets_a_line_once_a_wait_is_long() -> None:
    said: list[str] = []
    waits = Waits()
    lines = WaitLines(waits, said.append, first_s=0.1)
    waits.set("start of Ray", ["Ray"])
    lines.start()
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)
    lines.close()
    assert said == ["waiting for Ray: start of Ray, 0s"]


def test_the_panel_shows_who_is_awaited_until_they_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.orchestrator.run.live_console.LEAST_SHOWN_S", 0.0)
    out = io.StringIO()
    console = LiveConsole(4, out)
    console.waiting("start of Ray", ["Ray"])
    console.close()
    assert "waiting for Ray: start of Ray, 0s" in out.getvalue()
    out = io.StringIO()
    console = LiveConsole(4, out)
    console.waiting("start of Ray", ["Ray"])
    console.waiting("start of Ray", [])
    console.close()
    assert "waiting" not in out.getvalue()


def test_steps_end_the_lines_of_a_file() -> None:
    out = io.StringIO()
    console = PlainConsole(4, out)
    console._say_wait("waiting for Ray")
    console.log(1, {})
    console._say_wait("waiting for policy rank 0")
    console.close()
    assert "waiting for Ray" in out.getvalue()
    assert "policy rank 0" not in out.getvalue()
