"""What a run does about a failure.

Failures that concern the run itself (a reward, numerics, the disk) end it. For infrastructure failures, which another
attempt may not meet again, `decide` is a pure function of the run's situation and `run_with_restarts` carries out its
decision: training workers end and start again from the newest complete checkpoint. Engines and inference-only models
that are healthy keep running. (Where those are lost, they are replaced before a restart is needed: `actors/groups.py`,
`actors/engine_group.py`.) Every random choice is a function of the seed and the step, so a restarted synchronous run is
identical to one that never failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from rlhf.errors import INFRASTRUCTURE, CheckpointError, MemoryExhaustedError, PreemptedError, RlhfError
from rlhf.orchestrator.run.checkpoint import Checkpoints
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.repair import Repair, Repaired, RepairKind

LONGEST_PAUSE_S = 30.0


class Action(StrEnum):
    """What to do about a failure."""

    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureContext:
    """The state of a run when it fails."""

    has_started: bool
    """Whether all processes of this run were up once: a run that never started would fail again."""
    has_checkpoint: bool
    num_restarts: int
    """Restarts since a step was last saved."""
    max_restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, when, and why."""

    action: Action
    reason: str
    pause_s: float = 0.0


def decide(context: FailureContext) -> Decision:
    """Restart a run that lost its infrastructure, within the budget."""
    if not context.has_started:
        return Decision(action=Action.STOP, reason="the run has never been up")
    if not context.has_checkpoint:
        return Decision(action=Action.STOP, reason="nothing is saved yet")
    if context.num_restarts >= context.max_restarts:
        reason = f"started again {context.num_restarts} times without a new step saved (cluster.max_restarts)"
        return Decision(action=Action.STOP, reason=reason)
    pause_s = min(LONGEST_PAUSE_S, 2.0**context.num_restarts)
    left = f"restart {context.num_restarts + 1} of {context.max_restarts}"
    return Decision(action=Action.RESTART, reason=left, pause_s=pause_s)


class Attempts(Protocol):
    """Starting a run, again and again."""

    has_started: bool
    """Whether all processes were up once."""

    def run(self, resume_from: ResumePoint | None) -> None:
        """Start every process and train to the end."""
        ...

    def use_less_memory(self, error: MemoryExhaustedError) -> str | None:
        """Change what the next attempt does after memory ran out in a model. Returns what changed; None if nothing
        could help, or may."""
        ...

    def clear(self) -> Sequence[str]:
        """End the processes of the last attempt, but for those that lost nothing and serve the next one too. Returns
        the names of these."""
        ...


def run_with_restarts(
    attempts: Attempts,
    resume_from: ResumePoint | None,
    *,
    checkpoints: Checkpoints,
    max_restarts: int,
    stop: StopRequest,
    repaired: Repaired,
) -> None:
    """Run to the end, through restarts. `max_restarts` are allowed in a row without a step saved in between.

    Where memory ran out, the next attempt needs less of it, or there is none.

    Raises: the failure that is not worth another start; PreemptedError where asked to stop between attempts.
    """
    point, num_restarts = resume_from, 0
    while True:
        try:
            return attempts.run(point)
        except (*INFRASTRUCTURE, MemoryExhaustedError) as error:
            saved = _newest(checkpoints)
            if saved is not None and (point is None or saved.state.step > point.state.step):
                num_restarts = 0
            decision = decide(
                FailureContext(
                    has_started=attempts.has_started,
                    has_checkpoint=saved is not None,
                    num_restarts=num_restarts,
                    max_restarts=max_restarts,
                )
            )
            failure = str(error)
            if decision.action is Action.RESTART and isinstance(error, MemoryExhaustedError):
                changed = attempts.use_less_memory(error)
                failure += f" From here on {changed}." if changed else ""
                decision = decision if changed else replace(decision, action=Action.STOP)
            if decision.action is Action.STOP:
                if (last := _given_up(error, decision, num_restarts, saved)) is not error:
                    raise last from error
                raise
            assert saved is not None, decision
        try:
            surviving = ", ".join(attempts.clear())
        except INFRASTRUCTURE as worse:
            raise type(worse)(f"{failure} {worse}") from worse
        who = f"All but {surviving} start again" if surviving else "Everything starts again"
        text = f"{failure} {who} after step {saved.state.step} ({decision.reason})"
        repaired(Repair(kind=RepairKind.RESTART, where=text, text=text))
        if stop.wait(decision.pause_s):
            raise PreemptedError(f"asked to stop: step {saved.state.step} is saved; continue with --resume")
        point, num_restarts = saved, num_restarts + 1


def _given_up(error: RlhfError, decision: Decision, num_restarts: int, saved: ResumePoint | None) -> RlhfError:
    """The error that ends a run."""
    if isinstance(error, MemoryExhaustedError):
        named = f" Step {saved.state.step} is saved; continue with --resume." if saved is not None else ""
        return MemoryExhaustedError(f"{error}{named}", error.splittable_tokens)
    return type(error)(f"{error} Given up: {decision.reason}.") if num_restarts else error


def _newest(checkpoints: Checkpoints) -> ResumePoint | None:
    """The newest whole checkpoint, if there is one."""
    try:
        path, state = checkpoints.newest()
    except CheckpointError:
        return None
    return ResumePoint(path=path, state=state)
