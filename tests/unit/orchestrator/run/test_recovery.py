"""What a run does about a failure: the decision as a table, and restarts that leave no trace in what is learned."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf.errors import (
    CheckpointError,
    ConfigError,
    MemoryExhaustedError,
    NumericsError,
    PreemptedError,
    RewardError,
    RlhfError,
    StallError,
    WeightSyncError,
    WorkerLostError,
)
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.recovery import Action, FailureContext, decide, run_with_restarts
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.repair import Repair
from tests.unit.orchestrator.counted import CallCounter, counted_run, evidence
from tests.unit.orchestrator.support import Run

pytestmark = pytest.mark.timeout(120)


def test_a_run_is_started_again_within_its_budget() -> None:
    pauses = []
    for number in range(8):
        decision = decide(FailureContext(has_started=True, has_checkpoint=True, num_restarts=number, max_restarts=8))
        assert (decision.action, decision.reason) == (Action.RESTART, f"restart {number + 1} of 8")
        pauses.append(decision.pause_s)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    spent = decide(FailureContext(has_started=True, has_checkpoint=True, num_restarts=8, max_restarts=8))
    assert spent.action is Action.STOP
    assert spent.reason == "started again 8 times without a new step saved (cluster.max_restarts)"


@pytest.mark.parametrize(
    ("standing", "reason"),
    [
        (FailureContext(has_started=False, has_checkpoint=True, num_restarts=0, max_restarts=2), "never been up"),
        (FailureContext(has_started=True, has_checkpoint=False, num_restarts=0, max_restarts=2), "nothing is saved"),
        (FailureContext(has_started=True, has_checkpoint=True, num_restarts=0, max_restarts=0), "0 times"),
    ],
)
def test_a_run_that_cannot_go_on_ends(standing: FailureContext, reason: str) -> None:
    decision = decide(standing)
    assert decision.action is Action.STOP
    assert reason in decision.reason


class Launches:
    """The attempts of a fused run: each start has new engines, as new processes are."""

    def __init__(self, make: Callable[[int], Run], records: Records, checkpoints: Checkpoints, fresh: RunState) -> None:
        self.has_started = True
        self.runs: list[Run] = []
        self.num_cleared = 0
        self.spared: list[str] = []
        self.limits: list[int] = []
        """The micro-batches of each attempt after memory ran out; an attempt at 0 tokens is not made."""
        self._make = make
        self._parts = (records, checkpoints, fresh)

    def run(self, resume_from: ResumePoint | None) -> None:
        self.runs.append(self._make(len(self.runs)))
        self.runs[-1].loop(*self._parts).run(resume_from)

    def use_less_memory(self, error: MemoryExhaustedError) -> str | None:
        self.limits.append(error.splittable_tokens // 2)
        return f"at most {self.limits[-1]} tokens" if self.limits[-1] else None

    def clear(self) -> list[str]:
        self.num_cleared += 1
        return self.spared


def run_through_failures(
    path: Path,
    make: Callable[[int], Run],
    *,
    max_restarts: int = 2,
    stop: StopRequest | None = None,
    spared: Sequence[str] = (),
    on_note: Callable[[], None] = lambda: None,
) -> tuple[Launches, list[str]]:
    """Run to the end. Returns the attempts, and what was noted."""
    notes: list[str] = []
    with make(-1).open(resume=False) as (records, checkpoints, fresh):
        launches = Launches(make, records, checkpoints, fresh)
        launches.spared = list(spared)

        def note(repair: Repair) -> None:
            notes.append(f"{repair.kind}: {repair.text}")
            on_note()

        run_with_restarts(
            launches,
            None,
            checkpoints=checkpoints,
            max_restarts=max_restarts,
            stop=stop or StopRequest(20.0),
            repaired=note,
        )
    return launches, notes


def lose() -> None:
    raise WorkerLostError("policy rank 1 died.")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.orchestrator.run.recovery.LONGEST_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> object:
    run = counted_run(tmp_path_factory.mktemp("whole") / "a", CallCounter(0, lose))
    run.run()
    return evidence(run)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("kind", [StallError, WeightSyncError])
def test_a_stall_is_a_loss_too(tmp_path: Path, uninterrupted: object, kind: type[RlhfError]) -> None:
    def fail() -> None:
        raise kind("policy forward: no answer after 5 s")

    launches, notes = run_through_failures(
        tmp_path / "a", lambda number: counted_run(tmp_path / "a", CallCounter(0 if number else 40, fail))
    )
    assert evidence(launches.runs[-1]) == uninterrupted
    assert len(notes) == 1


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("calls", [8, 20, 33, 52, 71, 90, 113])
def test_a_worker_lost_anywhere_changes_nothing(tmp_path: Path, uninterrupted: object, calls: int) -> None:
    """Two losses, in two attempts; the calls are spread over sampling, scoring, learning, syncing and saving."""
    launches, notes = run_through_failures(
        tmp_path / "a", lambda number: counted_run(tmp_path / "a", CallCounter(calls if number < 2 else 0, lose))
    )
    assert evidence(launches.runs[-1]) == uninterrupted
    assert launches.num_cleared == len(notes) == len(launches.runs) - 1 > 0
    assert notes[0].startswith("restart: policy rank 1 died. Everything starts again after step ")


@pytest.mark.usefixtures("no_pauses")
def test_a_restart_names_the_workers_that_stay(tmp_path: Path) -> None:
    _, notes = run_through_failures(
        tmp_path / "a",
        lambda number: counted_run(tmp_path / "a", CallCounter(0 if number else 40, lose)),
        spared=("reference rank 0", "rollout engine 0"),
    )
    assert notes[0].startswith(
        "restart: policy rank 1 died. All but reference rank 0, rollout engine 0 start again after step "
    )


@pytest.mark.usefixtures("no_pauses")
def test_the_budget_is_of_restarts_without_progress(tmp_path: Path, uninterrupted: object) -> None:
    """More losses than the budget, each after another step was saved."""
    launches, notes = run_through_failures(
        tmp_path / "a",
        lambda number: counted_run(tmp_path / "a", CallCounter(60 if number < 3 else 0, lose)),
        max_restarts=1,
    )
    assert evidence(launches.runs[-1]) == uninterrupted
    assert len(notes) > 1
    assert all("restart 1 of 1" in note for note in notes)


@pytest.mark.usefixtures("no_pauses")
def test_the_last_error_gives_the_number_of_restarts(tmp_path: Path) -> None:
    with pytest.raises(
        WorkerLostError,
        match=r"^policy rank 1 died\. Given up: started again 2 times without a new step saved \(cluster\.max",
    ):
        run_through_failures(tmp_path / "a", lambda _: counted_run(tmp_path / "a", CallCounter(6, lose)))


@pytest.mark.usefixtures("no_pauses")
def test_a_stop_between_attempts_is_obeyed(tmp_path: Path) -> None:
    stop = StopRequest(20.0)
    with pytest.raises(PreemptedError, match=r"step \d is saved; continue with --resume"):
        run_through_failures(
            tmp_path / "a",
            lambda _: counted_run(tmp_path / "a", CallCounter(20, lose)),
            stop=stop,
            on_note=stop.request,
        )


@pytest.mark.parametrize(
    "error",
    [
        RewardError("refused"),
        NumericsError("x"),
        CheckpointError("x"),
        ConfigError("x"),
        PreemptedError("x"),
        RlhfError("x"),
        KeyboardInterrupt(),
    ],
)
def test_what_another_start_would_meet_again_ends_the_run(tmp_path: Path, error: BaseException) -> None:
    """At once: no checkpoint is read, which may take longer than the time that a signal leaves."""

    class Once:
        has_started = True

        def run(self, resume_from: ResumePoint | None) -> None:
            raise error

        def use_less_memory(self, error: MemoryExhaustedError) -> str | None:
            raise AssertionError

        def clear(self) -> Sequence[str]:
            raise AssertionError

    checkpoints = Checkpoints(
        tmp_path / "none", keep=1, warn=pytest.fail, repaired=lambda repair: pytest.fail(repair.text)
    )
    with pytest.raises(type(error)) as caught:
        run_with_restarts(
            Once(),
            None,
            checkpoints=checkpoints,
            max_restarts=5,
            stop=StopRequest(20.0),
            repaired=lambda repair: pytest.fail(repair.text),
        )
    assert caught.value is error
