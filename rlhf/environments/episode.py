"""One episode: the engine's turns and the world's replies, until one of them ends it."""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TypeVar

from rlhf.engines.base import Tokenizer
from rlhf.environments.calls import Call, CallFormat, UnreadCall
from rlhf.environments.conversation import Conversation, SealedError
from rlhf.environments.session import EnvironmentFaultError, Reply, Session
from rlhf.environments.spec import EpisodeWorld
from rlhf.environments.transcript import Transcript
from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.types import FinishReason, IntArray, Json, Message, Prompt, Rollout, RolloutRequest, Sampling

T = TypeVar("T")
Sample = Callable[[RolloutRequest], Awaitable[Rollout]]
FINISH: Mapping[Ending, FinishReason] = {
    Ending.ANSWER: FinishReason.STOP,
    Ending.TERMINATED: FinishReason.STOP,
    Ending.TRUNCATED: FinishReason.LENGTH,
    Ending.MAX_TURNS: FinishReason.LENGTH,
    Ending.MAX_TOKENS: FinishReason.LENGTH,
    Ending.SEALED: FinishReason.LENGTH,
    Ending.ABORTED: FinishReason.ABORTED,
    Ending.FAILED: FinishReason.ABORTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """How long an episode may be."""

    max_turns: int
    """Turns of the model."""
    max_turn_tokens: int | None
    """Tokens of one of the model's turns; None: only those of the response count."""
    max_tool_response_tokens: int
    """Tokens of a reply; of a longer one the middle is left out."""
    context: int
    """Tokens of a prompt and what follows it that the engine takes."""
    max_tokens: int
    """Tokens of all segments together, prompts included: what one response may need when it is learned from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What all episodes in the same environment share."""

    tokenizer: Tokenizer
    described: EpisodeWorld
    format: CallFormat
    limits: EpisodeLimits
    conversation: type[Conversation] = Conversation


@dataclass(slots=True)
class _Counts:
    """What happened in an episode so far."""

    calls: Counter[str]
    num_calls: int = 0
    num_turns: int = 0
    num_failed_calls: int = 0
    rewards: list[float] = field(default_factory=list)
    """Of each turn."""
    parts: Mapping[str, float] | None = None
    world_s: float = 0.0


class EpisodeRun:
    """Runs one episode once, in one task.

    Waits for the engine's next turn (which ends by itself) and for what tools and environment return (which have
    deadlines). Raises EnvironmentFaultError, which names environment, row and turn, where the environment cannot go on.
    """

    def __init__(
        self,
        rules: Rules,
        request: RolloutRequest,
        prompt: Prompt,
        session: Session,
        sample: Sample,
        *,
        has_environment: bool,
    ) -> None:
        self._rules = rules
        self._request = request
        self._prompt = prompt
        self._session = session
        self._sample = sample
        self._transcript = Transcript(rules.tokenizer, prompt, rules.described.tools, rules.conversation, rules.format)
        self._has_environment = has_environment
        self._counts = _Counts(calls=Counter())

    async def run(self) -> EpisodeRollout:
        """The complete response."""
        try:
            ending = await self._begin() if self._has_environment else None
            while ending is None:
                ending = await self._turn(steps=self._has_environment and self._rules.described.steps)
            if self._has_environment and self._rules.described.rewards and ending is not Ending.ABORTED:
                self._add_reward(await self._timed(self._session.reward()))
        except EnvironmentFaultError as error:
            turn = self._counts.num_turns
            raise EnvironmentFaultError(f"row {self._prompt.id}, turn {turn}: {error}") from error
        return self.finished(ending)

    def finished(self, ending: Ending, failure: str = "") -> EpisodeRollout:
        """The response so far, as one that has ended."""
        whole = self._transcript.rollout(self._request.id, self._request.prompt_id, FINISH[ending])
        counts = self._counts
        episode = Episode(
            messages=self._transcript.messages,
            ending=ending,
            num_segments=len(self._transcript.segments),
            num_turns=counts.num_turns,
            calls=dict(sorted(counts.calls.items())),
            num_calls=counts.num_calls,
            num_failed_calls=counts.num_failed_calls,
            num_world_tokens=self._transcript.num_world_tokens,
            turn_ends=self._transcript.turn_ends,
            turn_rewards=tuple(counts.rewards),
            parts=counts.parts or {},
            failure=failure,
        )
        return EpisodeRollout.of(whole, episode)

    @property
    def world_s(self) -> float:
        """Seconds in tools and the environment so far."""
        return self._counts.world_s

    @property
    def _talk(self) -> Conversation:
        return self._transcript.current

    async def _begin(self) -> Ending | None:
        """Reset the environment. What the user says first stands before the model's first turn, and so does what opens
        that turn: prompts of environments leave it open who speaks next."""
        said = await self._timed(self._session.open(row_of(self._prompt)))
        return self._hear([] if said is None else [Message(role="user", content=self._talk.clean(said))])

    async def _turn(self, *, steps: bool) -> Ending | None:
        """One turn of the model, and what comes back. None: the episode goes on."""
        limits, counts = self._rules.limits, self._counts
        room = self._room(self._talk)
        sampling = replace(self._request.sampling, max_tokens=min(room, limits.max_turn_tokens or room))
        rollout = await self._sample(turn_request(self._request, counts.num_turns, self._talk.request_ids, sampling))
        counts.num_turns += 1
        counts.rewards.append(0.0)
        text, said = self._transcript.add_turn(self._talk, rollout)
        if rollout.finish_reason is not FinishReason.STOP:
            return Ending.ABORTED if rollout.finish_reason is FinishReason.ABORTED else Ending.MAX_TOKENS
        calls = said.calls if self._rules.described.tools else ()
        if not calls and not steps:
            return Ending.ANSWER
        heard = self._rules.format.beside(said, text)
        replies = [await self._reply(call) for call in calls] or [await self._timed(self._session.step(heard))]
        for reply in replies:
            self._add_reward(reply.reward)
            counts.parts = reply.info or counts.parts
        if any(reply.terminated for reply in replies):
            return Ending.TERMINATED
        if any(reply.truncated for reply in replies):
            return Ending.TRUNCATED
        if counts.num_turns >= limits.max_turns:
            return Ending.MAX_TURNS
        asked: Sequence[Call | UnreadCall | None] = calls or [None]
        return self._hear([self._message(reply, call) for reply, call in zip(replies, asked, strict=True)])

    async def _reply(self, call: Call | UnreadCall) -> Reply:
        """What a call gives; that it fails is an observation too."""
        described, counts = self._rules.described, self._counts
        if isinstance(call, UnreadCall):
            reply = Reply(text=f"error: {call.why}", failed=True)
        elif call.name not in described.tool_names:
            known = ", ".join(described.tool_names)
            reply = Reply(text=f"error: there is no tool {call.name[:60]}; there are {known}", failed=True)
        else:
            counts.calls[call.name] += 1
            ask = self._session.call_method if call.name in described.methods else self._session.call_function
            reply = await self._timed(ask(call.name, call.arguments))
        counts.num_calls += 1
        counts.num_failed_calls += reply.failed
        return reply

    def _message(self, reply: Reply, call: Call | UnreadCall | None) -> Message:
        """A reply as the model reads it: of a tool, or of the user for a turn that called none. A template that takes
        calls apart has no place for a tool's answer to what is no call."""
        text = self._talk.cut(self._talk.clean(reply.text), self._rules.limits.max_tool_response_tokens)
        if isinstance(call, Call):
            return Message(role="tool", content=text, fields={"name": call.name, "tool_call_id": call.id})
        is_users = call is None or self._rules.format.takes_apart
        return Message(role="user" if is_users else "tool", content=text)

    def _hear(self, said: Sequence[Message]) -> Ending | None:
        """Add what was said, if the model's next turn has room after it. A conversation that cannot go on as it was
        sampled goes on in a new segment."""
        talk = self._talk
        try:
            text, ids = talk.world_tokens(said)
        except SealedError:
            return self._begin_segment([*talk.messages, *said])
        if self._room(talk) <= len(ids):
            return Ending.MAX_TOKENS
        talk.add_world(said, text, ids)
        return None

    def _begin_segment(self, messages: Sequence[Message]) -> Ending | None:
        """Go on with the messages as the chat template writes them now, if there is room."""
        try:
            rules = self._rules
            segment = Conversation.rendered(rules.tokenizer, messages, rules.described.tools, rules.format)
        except SealedError:
            return Ending.SEALED
        if self._room(segment) <= 0:
            return Ending.SEALED
        self._transcript.segments.append(segment)
        return None

    def _room(self, talk: Conversation) -> int:
        # What came back counts as the response's, whose limit holds from the row's prompt on.
        context = len(self._request.prompt_token_ids) + self._request.sampling.max_tokens
        return self._transcript.room(talk, context, self._rules.limits.max_tokens)

    def _add_reward(self, reward: float | None) -> None:
        """Add to the reward of the turn that was last; of an episode without one, to the only reward."""
        self._counts.rewards = self._counts.rewards or [0.0]
        self._counts.rewards[-1] += reward or 0.0

    async def _timed(self, awaited: Awaitable[T]) -> T:
        start = time.monotonic()
        try:
            return await awaited
        finally:
            self._counts.world_s += time.monotonic() - start


def row_of(prompt: Prompt) -> dict[str, Json]:
    """The columns that an environment may get: those of the row, the prompt's messages, its text as the policy reads
    it, and the label."""
    return {"prompt_text": prompt.text, **prompt.metadata, **({} if prompt.label is None else {"label": prompt.label})}


def turn_request(given: RolloutRequest, turn: int, token_ids: IntArray, sampling: Sampling) -> RolloutRequest:
    """The request for a turn of the response that `given` asks for. The first one has the seed of the response."""
    return replace(
        given,
        id=f"{given.id}/turn{turn}",
        prompt_token_ids=token_ids,
        seed=given.seed if not turn else _turn_seed(given.seed, turn),
        sampling=sampling,
    )


def _turn_seed(seed: int, turn: int) -> int:
    """The seed of a later turn: a function of the response's seed and the turn alone, in [0, 2^63)."""
    digest = blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
