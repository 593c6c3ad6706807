"""A rollout engine whose responses are episodes: it asks another engine for each turn."""

import asyncio
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rlhf.engines.base import RolloutEngine
from rlhf.engines.process.repairs import log_repair
from rlhf.environments.agent_run import AgentRun
from rlhf.environments.endpoint import Endpoint
from rlhf.environments.episode import EpisodeRun, Rules, Sample
from rlhf.environments.routing import RunRules
from rlhf.environments.session import EnvironmentFaultError, LocalSession, Session, Sessions
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import ConfigError, RewardError, StallError
from rlhf.repair import Repair, Repaired, RepairKind
from rlhf.types import FloatArray, PackedTokens, Prompt, Rollout, RolloutRequest

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPolicy:
    """What is done about tools and environments that fail or hang."""

    num_retries: int
    """How often an episode begins anew whose environment failed."""
    on_error: Literal["drop", "fail"]
    """Whether a response whose environment failed every time is left out, or ends the run."""


class EpisodeEngine:
    """Implements `RolloutEngine`: a request is for a whole episode.

    One thread with an event loop, and one task an episode.
        consumes: requests, from any thread; turns of the engine; replies of processes. Produces: the ends of futures.
        Waits for: the engine and the processes, each of which has its own deadlines. Unblocked by: `abort`, `close`.
    The user's code runs in processes (`Sessions`), never here. First turns that are asked for together reach the engine
    in one call, and so do later ones of the same moment.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        spec: WorldSpec,
        rules: RunRules,
        faults: FaultPolicy,
        prompts: Sequence[Prompt],
        sessions: Sessions,
        *,
        repaired: Repaired = log_repair,
    ) -> None:
        """`prompts` are all that requests may be for, by their ids; `sessions` end with this engine."""
        self._engine = engine
        self._spec = spec
        self._rules = rules
        self._faults = faults
        self._prompts = _by_content(prompts)
        self._repaired = repaired
        self._sessions = sessions
        self._endpoint = None if spec.agent is None else Endpoint()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        """Environments that are being closed."""
        self._under_way: dict[str, dict[str, Future[Rollout]]] = {}
        """Turns that the engine was or will be asked for, by the episode's request and then by their own."""
        self._outbox: list[tuple[RolloutRequest, Future[Rollout]]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """See `RolloutEngine.submit`. Raises RewardError through a future, with `on_error` fail."""
        futures: list[Future[Rollout]] = [Future() for _ in requests]
        self._loop.call_soon_threadsafe(self._begin, list(zip(requests, futures, strict=True)))
        return futures

    def abort(self, request_ids: Collection[str]) -> None:
        """See `RolloutEngine.abort`."""
        self._loop.call_soon_threadsafe(self._abort, list(request_ids))

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        return self._engine.score(sequences)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`. Waits for the ends of aborted episodes, which may ask for turns until then. Raises
        StallError."""
        ended = asyncio.run_coroutine_threadsafe(self._end_aborted(), self._loop)
        try:
            ended.result(CLOSE_TIMEOUT_S)
        except TimeoutError:
            raise StallError(f"episodes: aborted ones have not ended for {CLOSE_TIMEOUT_S:g} s") from None
        self._engine.sleep()

    async def _end_aborted(self) -> None:
        await asyncio.gather(*[task for task in self._tasks.values() if task.cancelling()], return_exceptions=True)

    def wake(self) -> None:
        self._engine.wake()

    def close(self) -> None:
        """End episodes, the processes of tools and environments, and the thread. Not the engine, which others use."""
        if self._loop.is_closed():
            return
        with suppress(TimeoutError):  # processes end with this one at the latest
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        self._abort(list(self._tasks))
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._sessions.close()  # which ends what environments still do
        await asyncio.gather(*self._closing, return_exceptions=True)
        if self._endpoint is not None:
            await self._endpoint.close()

    def _begin(self, asked: Sequence[tuple[RolloutRequest, "Future[Rollout]"]]) -> None:
        for request, future in asked:
            task = self._loop.create_task(self._answer(request, future))
            self._tasks[request.id] = task
            task.add_done_callback(partial(self._ended, request.id, future))

    def _ended(self, request_id: str, future: "Future[Rollout]", task: "asyncio.Task[None]") -> None:
        if task.cancelled() and future.cancel():  # here, because a task may end before it began
            future.set_running_or_notify_cancel()
        if self._tasks.get(request_id) is task:
            del self._tasks[request_id]

    def _abort(self, request_ids: Collection[str]) -> None:
        for name in request_ids:
            if (task := self._tasks.get(name)) is not None:
                task.cancel()
        self._abort_turns(request_ids)

    def _abort_turns(self, request_ids: Collection[str]) -> None:
        """End the turns under way of these episodes, also in the engine."""
        turns = {id_: turn for name in request_ids for id_, turn in self._under_way.pop(name, {}).items()}
        for turn in turns.values():
            turn.cancel()
        if turns:
            self._engine.abort(list(turns))

    async def _answer(self, request: RolloutRequest, future: "Future[Rollout]") -> None:
        """The task of one request: whatever happens, its future ends, by `_ended` where the task is cancelled."""
        try:
            rollout = await self._episode(request)
        except Exception as error:  # the boundary of the task: who waits for the future raises it
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(rollout)

    async def _episode(self, request: RolloutRequest) -> EpisodeRollout:
        """The request's response; of a failing environment, from anew, as often as that is allowed."""
        prompt = self._prompts[request.prompt_id, request.prompt_token_ids.tobytes()]
        rules, failure, failed_s = self._rules.of(prompt), "", 0.0
        for tries in range(self._faults.num_retries + 1):
            session = self._sessions.session(f"{request.id}#{tries}", alone=tries > 0)
            run = self._new_run(rules, request, prompt, session, partial(self._sample, request.id, tries))
            try:
                rollout = await run.run()
            except EnvironmentFaultError as error:
                failed_s += run.world_s
                failure = f"{rules.described.environment or self._spec.name}: {error}"
                self._tell(failure, begins_anew=tries < self._faults.num_retries)
                continue
            finally:
                self._abort_turns([request.id])  # before its response is there: engines may sleep then
                self._close_later(session)
            return _after(tries, failed_s + run.world_s, rollout)
        if self._faults.on_error == "fail":
            raise RewardError(f"environment {failure} ({self._faults.num_retries + 1} tries)")
        return _after(self._faults.num_retries, failed_s, run.finished(Ending.FAILED, failure))

    def _new_run(
        self, rules: Rules, request: RolloutRequest, prompt: Prompt, session: Session, sample: Sample
    ) -> EpisodeRun | AgentRun:
        if self._endpoint is not None:
            assert isinstance(session, LocalSession), "loops reach the endpoint on this node alone"
            return AgentRun(rules, request, prompt, session, sample, self._endpoint)
        has_environment = bool(self._spec.environments)
        return EpisodeRun(rules, request, prompt, session, sample, has_environment=has_environment)

    def _close_later(self, session: Session) -> None:
        """Close an environment without making its response wait."""
        task = self._loop.create_task(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _tell(self, failure: str, *, begins_anew: bool) -> None:
        then = "its episode begins anew" if begins_anew else "its response is left out"
        text = f"environment {failure}; {then}"
        self._repaired(Repair(kind=RepairKind.ENVIRONMENT, where=self._spec.name, text=text))

    async def _sample(self, episode_id: str, tries: int, request: RolloutRequest) -> Rollout:
        """One turn by the engine. An episode that began anew asks under other names: the engine may still be busy with
        a turn of the one before."""
        if tries:
            request = replace(request, id=f"{episode_id}/try{tries}{request.id.removeprefix(episode_id)}")
        turn: Future[Rollout] = Future()
        if not self._outbox:
            self._loop.call_soon(self._send)
        self._outbox.append((request, turn))
        self._under_way.setdefault(episode_id, {})[request.id] = turn
        try:
            return await asyncio.wrap_future(turn)
        finally:
            self._under_way.get(episode_id, {}).pop(request.id, None)

    def _send(self) -> None:
        """Ask the engine for the turns that wait, in one call."""
        outbox, self._outbox = self._outbox, []
        wanted = [(request, turn) for request, turn in outbox if not turn.cancelled()]
        try:
            sampled = self._engine.submit([request for request, _ in wanted])
        except Exception as error:  # the boundary of the loop: who waits for the turns raises it
            for _, turn in wanted:
                turn.set_exception(error)
            return
        for (_, turn), future in zip(wanted, sampled, strict=True):
            future.add_done_callback(partial(_pass_on, turn))


def _after(num_retries: int, world_s: float, rollout: EpisodeRollout) -> EpisodeRollout:
    """A response with what all tries took."""
    return replace(rollout, episode=replace(rollout.episode, num_retries=num_retries, world_s=world_s))


def _by_content(prompts: Sequence[Prompt]) -> dict[tuple[str, bytes], Prompt]:
    """Prompts by id and tokens, as requests name them. Raises ConfigError where that leaves open which row is meant."""
    found: dict[tuple[str, bytes], Prompt] = {}
    for prompt in prompts:
        known = found.setdefault((prompt.id, prompt.token_ids.tobytes()), prompt)
        if known.metadata != prompt.metadata or known.label != prompt.label:
            raise ConfigError(
                f'data: two rows have the id "{prompt.id}" and the same prompt, and differ in other columns.'
            )
    return found


def _pass_on(turn: "Future[Rollout]", ended: "Future[Rollout]") -> None:
    """End a turn's future as the engine's ended, unless nobody waits for it any more."""
    if not turn.set_running_or_notify_cancel():
        return
    if ended.cancelled():
        turn.set_exception(asyncio.CancelledError())
    elif (error := ended.exception()) is not None:
        turn.set_exception(error)
    else:
        turn.set_result(ended.result())
