"""One episode of a user's own loop: requests of a chat API become turns of a response, with exact tokens."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf.conversations.messages import as_json
from rlhf.environments import openai_api
from rlhf.environments.calls import Call, CallFormat
from rlhf.environments.chat import ChatAnswer, ChatError, ChatRequest
from rlhf.environments.conversation import Conversation, SealedError
from rlhf.environments.endpoint import Endpoint
from rlhf.environments.episode import FINISH, Rules, Sample, row_of, turn_request
from rlhf.environments.formats.known import find_format
from rlhf.environments.idle import IdleClock
from rlhf.environments.session import EnvironmentFaultError, LocalSession, Reply
from rlhf.environments.transcript import Transcript
from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.errors import ModelError
from rlhf.types import FinishReason, Json, Message, Prompt, Rollout, RolloutRequest

EXCEEDED = "context_length_exceeded"


@dataclass(slots=True, kw_only=True)
class _Thread:
    """One conversation of the loop's. A loop may have several, also at the same time (sub-agents)."""

    talk: Conversation
    heard: list[object]
    """Keys of its messages, as a request repeats them."""
    tools: tuple[Json, ...]
    is_busy: bool = False
    reserved: int = 0
    """Tokens that its turn under way may have."""


class _CrowdedError(Exception):
    """A request would leave turns under way, or they it, without the tokens that they may have."""


class AgentRun:
    """Answers the requests of one episode, and gives the response that they make.

    A request that repeats one of its conversations and adds messages continues it: the tokens that were sampled stay,
    and those of what the chat template writes for the new messages follow. Any other request, or one where the
    template rewrites what was sampled, begins a segment with the conversation as the template writes it. Requests at
    the same time may together have what one response may: one for which that is not enough waits for a turn to end.

    All in one event loop, a task for each request.
        consumes: requests of the loop, from the endpoint. Produces: answers. Waits for: the engine's turn, which ends
        by itself; the loop's end, or `environment_timeout_s` without a request. A request that waits for
        another's turn is unblocked by the end of that.
    """

    def __init__(
        self,
        rules: Rules,
        request: RolloutRequest,
        prompt: Prompt,
        session: LocalSession,
        sample: Sample,
        endpoint: Endpoint,
    ) -> None:
        self._rules = rules
        self._request = request
        self._prompt = prompt
        self._session = session
        self._sample = sample
        self._endpoint = endpoint
        self._clock = IdleClock(session.timeout_s)
        self._transcript = Transcript(rules.tokenizer, prompt, (), form=rules.format)
        first = self._transcript.current
        body: dict[str, Json] = {"messages": [as_json(message) for message in first.messages]}
        heard: list[object] = [one.key for one in openai_api.read(body).messages]
        self._threads = [_Thread(talk=first, heard=heard, tools=())]
        self._formats: dict[str, CallFormat] = {}
        self._calls: Counter[str] = Counter()
        self._num_unread = 0
        """Calls that could not be read, and those beside them."""
        self._num_turns = 0
        self._ended: Ending | None = None
        """Why the request that came last was refused."""
        self._turn_over = asyncio.Event()
        """Set and cleared when a turn ends."""
        self._stopped: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        """Ends where the engine gives no further turn: with why, or with its error."""

    async def run(self) -> EpisodeRollout:
        """Run the loop. Raises EnvironmentFaultError, which names row and turn, where it fails by itself."""
        async with self._endpoint.serving(self.answer) as url:
            loop = asyncio.ensure_future(self._session.run(url, row_of(self._prompt), self._clock))
            try:
                ends: set[asyncio.Future[Reply] | asyncio.Future[Ending]] = {loop, self._stopped}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if self._stopped.done():
                    return self.finished(self._stopped.result())
                return self._result(await loop)
            except EnvironmentFaultError as error:
                if self._ended is not None:  # it was refused further turns, and did not catch that
                    return self.finished(self._ended)
                raise EnvironmentFaultError(f"row {self._prompt.id}, turn {self._num_turns}: {error}") from error
            finally:
                loop.cancel()
                self._stopped.cancel()
                await asyncio.gather(loop, return_exceptions=True)

    @property
    def world_s(self) -> float:
        """Seconds without a request so far."""
        return self._clock.total_s

    async def answer(self, chat: ChatRequest) -> ChatAnswer:
        """The policy's next turn. Raises ChatError."""
        form = self._format(chat.tools)
        thread = await self._thread(chat, form)
        with self._clock.busy():
            self._ended = None
            turn, self._num_turns = self._num_turns, self._num_turns + 1
            thread.is_busy = True
            try:
                return await self._turn(thread, chat, form, turn)
            finally:
                thread.is_busy, thread.reserved = False, 0
                self._turn_over.set()
                self._turn_over.clear()

    def finished(self, ending: Ending, failure: str = "", reply: Reply | None = None) -> EpisodeRollout:
        """The response so far, as one that has ended."""
        whole = self._transcript.rollout(self._request.id, self._request.prompt_id, FINISH[ending])
        ends = self._transcript.turn_ends
        reward = 0.0 if reply is None or reply.reward is None else reply.reward
        episode = Episode(
            messages=self._transcript.messages,
            ending=ending,
            num_turns=len(ends),
            num_segments=len(self._transcript.segments),
            turn_ends=ends,
            turn_rewards=(*[0.0] * (len(ends) - 1), reward),
            calls=dict(sorted(self._calls.items())),
            num_calls=self._calls.total() + self._num_unread,
            num_failed_calls=self._num_unread,
            num_world_tokens=self._transcript.num_world_tokens,
            parts={} if reply is None else reply.info,
            failure=failure,
        )
        return EpisodeRollout.of(whole, episode)

    async def _thread(self, chat: ChatRequest, form: CallFormat) -> _Thread:
        """The conversation of a request, once there is room for its turn beside those under way. Raises ChatError."""
        while True:
            if self._num_turns >= self._rules.limits.max_turns:
                self._ended = Ending.MAX_TURNS
                raise ChatError(f"the episode has {self._num_turns} turns (rollout.max_turns)", code="max_turns")
            try:
                return self._continued(chat) or self._begun(chat, form)
            except _CrowdedError:
                await self._turn_over.wait()

    def _result(self, reply: Reply) -> EpisodeRollout:
        if reply.truncated or (self._ended is not None and not reply.terminated):
            return self.finished(self._ended or Ending.TRUNCATED, reply=reply)
        return self.finished(Ending.TERMINATED if reply.terminated else Ending.ANSWER, reply=reply)

    async def _turn(self, thread: _Thread, chat: ChatRequest, form: CallFormat, turn: int) -> ChatAnswer:
        talk = thread.talk
        given = self._request.sampling
        asked = replace(
            given,
            max_tokens=self._room(talk),
            temperature=given.temperature if chat.temperature is None else chat.temperature,
            top_p=given.top_p if chat.top_p is None else chat.top_p,
        )
        # What another distribution gave is no sample of the policy that learns.
        is_learned = replace(asked, max_tokens=given.max_tokens) == given
        asked = replace(asked, max_tokens=self._wanted(asked.max_tokens, chat))
        thread.reserved = asked.max_tokens
        num_prompt_tokens = len(talk.request_ids)
        rollout = await self._sampled(turn_request(self._request, turn, talk.request_ids, asked))
        text, said = self._transcript.add_turn(talk, rollout, is_learned=is_learned)
        found = said.calls if chat.tools else ()
        calls = tuple(call for call in found if isinstance(call, Call))
        is_read = len(calls) == len(found)
        calls = calls if is_read else ()  # one that cannot be read is text, and so is the turn
        self._calls.update(call.name for call in calls)
        self._num_unread += len(found) - len(calls)
        answer = ChatAnswer(
            id=f"{self._request.id}-{turn}".replace("/", "-"),
            text=(form.beside(said, text) if is_read else text).replace("\x00", "\ufffd"),  # which can be sent back
            calls=calls,
            finish_reason=rollout.finish_reason,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=len(rollout.token_ids),
            log_probs=self._log_probs(rollout) if chat.with_log_probs else (),
        )
        thread.heard.append(answer.heard.key)
        return answer

    async def _sampled(self, request: RolloutRequest) -> Rollout:
        """The engine's turn. Where it gives none the episode ends, whatever its loop does. Raises ChatError."""
        try:
            rollout = await self._sample(request)
        except Exception as error:  # the boundary to the engine: who waits for the episode raises it
            if not self._stopped.done():
                self._stopped.set_exception(error)
            raise ChatError(f"the engine failed ({type(error).__name__})", code="aborted", status=503) from error
        if rollout.finish_reason is FinishReason.ABORTED:
            if not self._stopped.done():
                self._stopped.set_result(Ending.ABORTED)
            raise ChatError("the response is not wanted any more", code="aborted", status=503)
        return rollout

    def _continued(self, chat: ChatRequest) -> _Thread | None:
        """The conversation that the request goes on with. None: another segment begins."""
        keys = [message.key for message in chat.messages]
        for thread in reversed(self._threads):
            size = len(thread.heard)
            if thread.is_busy or thread.tools != chat.tools or keys[:size] != thread.heard:
                continue
            if not thread.talk.turns and size == len(keys):
                self._require_room(thread.talk, 0, chat)
                return thread
            added = chat.messages[size:]
            said = [self._cleaned(message.message) for message in added if message.message is not None]
            if not thread.talk.turns or len(said) < max(len(added), 1):
                continue
            try:
                text, ids = thread.talk.world_tokens(said)
            except SealedError:
                return None
            self._require_room(thread.talk, len(ids), chat)
            thread.talk.add_world(said, text, ids)
            thread.heard += [message.key for message in added]
            return thread
        return None

    def _begun(self, chat: ChatRequest, form: CallFormat) -> _Thread:
        """A new segment. Raises ChatError."""
        own = {key: turn for thread in self._threads for key, turn in _own_turns(thread).items()}
        messages = []
        for heard in chat.messages:
            if heard.role == "assistant" and heard.key in own:
                messages.append(_with_ids(own[heard.key], heard.message))
            elif heard.message is None:
                raise ChatError("an assistant's message is empty")
            else:
                messages.append(self._cleaned(heard.message))
        try:
            talk = Conversation.rendered(self._rules.tokenizer, messages, chat.tools, form)
        except SealedError as error:
            raise ChatError(f"the chat template does not take these messages: {error}") from error
        self._require_room(talk, 0, chat)
        self._transcript.segments.append(talk)
        self._threads.append(_Thread(talk=talk, heard=[message.key for message in chat.messages], tools=chat.tools))
        return self._threads[-1]

    def _cleaned(self, message: Message) -> Message:
        return replace(message, content=self._transcript.current.clean(message.content))

    def _format(self, tools: Sequence[Json]) -> CallFormat:
        """The form of calls. Raises ChatError."""
        if not tools:
            return self._rules.format
        key = repr(tools)
        try:
            self._formats[key] = self._formats.get(key) or find_format(self._rules.tokenizer, tools)
        except ModelError as error:
            raise ChatError(str(error)) from error
        return self._formats[key]

    def _room(self, talk: Conversation, reserved: int = 0) -> int:
        return self._transcript.room(talk, self._rules.limits.context, self._rules.limits.max_tokens, reserved)

    def _wanted(self, room: int, chat: ChatRequest) -> int:
        """How many tokens a turn may have where there is room for `room`."""
        limits = [room, chat.max_tokens, self._rules.limits.max_turn_tokens]
        return min(limit for limit in limits if limit is not None)

    def _require_room(self, talk: Conversation, num_added: int, chat: ChatRequest) -> None:
        """Raise ChatError where a conversation has no room for another turn, _CrowdedError where it has none beside
        the turns under way."""
        room = self._room(talk) - num_added
        if room <= 0:
            self._ended = Ending.MAX_TOKENS
            raise ChatError(
                f"there is room for {max(room + num_added, 0)} more tokens, and the request needs {num_added} and the "
                "answer's (rollout.max_prompt_tokens and max_response_tokens are the context, "
                "train.max_tokens_per_micro_batch holds all conversations of an episode)",
                code=EXCEEDED,
            )
        reserved = sum(thread.reserved for thread in self._threads)
        if self._room(talk, reserved) - num_added < self._wanted(room, chat):
            raise _CrowdedError

    def _log_probs(self, rollout: Rollout) -> tuple[tuple[str, float], ...]:
        decode = self._rules.tokenizer.decode
        return tuple(
            (decode([token], skip_special_tokens=False), log_prob)
            for token, log_prob in zip(rollout.token_ids.tolist(), rollout.log_probs.tolist(), strict=True)
        )


def _own_turns(thread: _Thread) -> dict[object, Message]:
    """The model's turns of a conversation as sampled, by how a request repeats them."""
    said = [message for message in thread.talk.messages if message.role == "assistant"]
    keys = [key for key in thread.heard if isinstance(key, tuple) and key[0] == "assistant"]
    return dict(zip(keys, said, strict=False))


def _with_ids(turn: Message, repeated: Message | None) -> Message:
    """A turn with the ids of its calls as the request repeats them, by which results name them."""
    calls = None if repeated is None else repeated.fields.get("tool_calls")
    if "tool_calls" not in turn.fields or not isinstance(calls, list):
        return turn
    return replace(turn, fields={**turn.fields, "tool_calls": calls})
