"""A conversation as the tokens that were sampled and those that the chat template writes between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf.conversations.continuing import continued
from rlhf.conversations.lost import lost_messages
from rlhf.conversations.messages import conversation_of
from rlhf.engines.base import Tokenizer
from rlhf.environments.calls import NO_CALLS, Call, CallFormat, Said, checked_call
from rlhf.environments.formats.known import difference
from rlhf.errors import DataError, ModelError
from rlhf.types import BoolArray, ExpertArray, FinishReason, FloatArray, IntArray, Json, Message, Prompt, Rollout

CONTEXT_TOKENS = 4
"""Tokens before a turn that its text is decoded with: some tokenizers drop the space of a text's first word."""


class SealedError(Exception):
    """The chat template does not write the conversation so far as it was sampled, so that it cannot go on. Says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the model: what it sampled, and where that begins among the tokens after the prompt."""

    start: int
    rollout: Rollout


class Conversation:
    """Sampled tokens are never decoded and encoded again: a turn adds the engine's tokens, and what comes back adds the
    tokens of what the chat template writes after that turn.

    That is only right if the template, given all turns, begins with exactly the text that is there: SealedError
    otherwise (thoughts removed from earlier turns, spaces changed, a turn that ended with another token). Then the
    rendered conversation and the tokens are the same text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Json],
        text: str,
        token_ids: IntArray,
        form: CallFormat = NO_CALLS,
    ) -> None:
        """`messages` as the template writes them, `text`, up to the model's first turn, and the tokens of that; `form`
        is how the model's turns are read and given to the template."""
        self._tokenizer = tokenizer
        self._tools = tools
        self._form = form
        self.prompt_ids = token_ids
        self.messages = list(messages)
        """All that was said, as the template takes it."""
        self._shown = text
        """All text so far, as the template writes it."""
        self._unended = ""
        """The text of the token that ended the last turn, which the template writes with what follows."""
        self._ids: list[IntArray] = []
        self._own: list[BoolArray] = []
        self._log_probs: list[FloatArray] = []
        self.turns: list[Turn] = []

    @classmethod
    def of_prompt(
        cls, tokenizer: Tokenizer, prompt: Prompt, tools: Sequence[Json], form: CallFormat = NO_CALLS
    ) -> "Conversation":
        """One that begins with a row's prompt."""
        return cls(tokenizer, conversation_of(prompt.metadata)[0], tools, prompt.text, prompt.token_ids, form)

    @classmethod
    def rendered(
        cls, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Json], form: CallFormat = NO_CALLS
    ) -> "Conversation":
        """One that begins with messages as the chat template writes them now. Raises SealedError if it does not."""
        try:
            text = tokenizer.render(messages, add_generation_prompt=True, tools=tools)
        except (DataError, ModelError) as error:
            raise SealedError(str(error)) from error
        return cls(tokenizer, messages, tools, text, np.array(tokenizer.encode(text), dtype=np.int64), form)

    @property
    def rendered_text(self) -> str:
        """Prompt and response as text, special tokens included."""
        return self._shown + self._unended

    @property
    def request_ids(self) -> IntArray:
        """[n]: prompt and response so far, which the next turn continues."""
        joined: IntArray = np.concatenate([self.prompt_ids, *self._ids]).astype(np.int64, copy=False)
        return joined

    @property
    def token_ids(self) -> IntArray:
        """[n]: the tokens after the prompt."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._ids])

    @property
    def own(self) -> BoolArray:
        """[n]: which of them the model wrote."""
        return np.concatenate([np.zeros(0, dtype=np.bool_), *self._own])

    @property
    def log_probs(self) -> FloatArray:
        """[n]: those of the model's tokens when it sampled them, 0 at the others."""
        return np.concatenate([np.zeros(0, dtype=np.float32), *self._log_probs])

    @property
    def routed_experts(self) -> ExpertArray | None:
        """Of all tokens, the prompt's too, in the turn that first computed them: unknown for the last one, and for what
        stands behind the last turn. None where no turn has any."""
        given = [(turn, turn.rollout.routed_experts) for turn in self.turns]
        known = [(turn, experts) for turn, experts in given if experts is not None]
        if not known:
            return None
        like, num_prompt = known[0][1], len(self.prompt_ids)
        joined = np.full((num_prompt + len(self), *like.shape[1:]), np.iinfo(like.dtype).max, dtype=like.dtype)
        start = 0
        for turn, experts in known:
            end = num_prompt + turn.start + len(turn.rollout.token_ids) - 1
            joined[start:end] = experts[start:end]
            start = end
        return joined

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    def add_turn(self, rollout: Rollout, *, is_learned: bool = True) -> tuple[str, Said]:
        """Add what the model sampled, to be learned from or only to be read. Returns its text without the token that
        ends it, and what that says; its calls have ids."""
        ids = rollout.token_ids
        before = (self._ids[-1] if self._ids else self.prompt_ids)[-CONTEXT_TOKENS:].tolist()
        self.turns.append(Turn(start=len(self), rollout=rollout))
        self._add(ids, np.full(len(ids), is_learned, dtype=np.bool_), rollout.log_probs)
        stopped = rollout.finish_reason is FinishReason.STOP and len(ids) and ids[-1] in self._tokenizer.stop_token_ids
        text = self._decode(before, (ids[:-1] if stopped else ids).tolist())
        self._unended = self._tokenizer.decode([int(ids[-1])], skip_special_tokens=False) if stopped else ""
        self._shown += text
        turn = sum(message.role == "assistant" for message in self.messages)
        said = _numbered(self._form.read(text, self._tools), turn)
        self.messages.append(self._form.message(said, text))
        return text, said

    def world_tokens(self, said: Sequence[Message]) -> tuple[str, IntArray]:
        """What the template writes between the last turn and the model's next one: text and tokens, where others said
        `said`. Raises SealedError."""
        messages = [*self.messages, *said]
        try:
            text = self._tokenizer.render(messages, add_generation_prompt=True, tools=self._tools)
        except (DataError, ModelError) as error:
            raise SealedError(str(error)) from error
        if not text.startswith(self.rendered_text):
            raise SealedError(difference(self.rendered_text, text))
        between = text[len(self.rendered_text) :]
        if lost_messages(said, between):
            raise SealedError("it leaves out what came back")
        ids = continued(self._tokenizer.encode, self._unended, between)
        return text, np.array(ids, dtype=np.int64)

    def add_world(self, said: Sequence[Message], text: str, ids: IntArray) -> None:
        """Add what `world_tokens` gave for `said`."""
        self._add(ids, np.zeros(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.float32))
        self.messages += said
        self._shown, self._unended = text, ""

    def clean(self, text: str) -> str:
        """A text that the world returned, with the special tokens in it broken up: a tokenizer takes them for the real
        ones, and what a tool returns must not end a turn."""
        for token in self._tokenizer.control_tokens:
            if token and token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
        return text

    def cut(self, text: str, max_tokens: int) -> str:
        """A text of at most about `max_tokens` tokens: of a longer one the middle is left out, which it says."""
        ids = self._tokenizer.encode(text)
        if len(ids) <= max_tokens:
            return text
        first, last = ids[: (max_tokens + 1) // 2], ids[len(ids) - max_tokens // 2 :]
        left_out = len(ids) - len(first) - len(last)
        ends = [self._tokenizer.decode(part, skip_special_tokens=False) for part in (first, last)]
        return f"{ends[0]}\n[{left_out} tokens left out]\n{ends[1]}"

    def _decode(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that tokens add to those before them."""
        head = self._tokenizer.decode(before, skip_special_tokens=False)
        joint = self._tokenizer.decode([*before, *ids], skip_special_tokens=False)
        return joint[len(head) :] if joint.startswith(head) else self._tokenizer.decode(ids, skip_special_tokens=False)

    def _add(self, ids: IntArray, own: BoolArray, log_probs: FloatArray) -> None:
        self._ids.append(ids)
        self._own.append(own)
        self._log_probs.append(log_probs)


def _numbered(said: Said, turn: int) -> Said:
    """What a turn says, with an id for each of its calls: that which the model wrote, else nine digits that no other
    call of the conversation has. Some templates take no other length."""
    calls = [
        replace(call, id=call.id or f"{turn:04d}{n:05d}") if isinstance(call, Call) else call
        for n, call in enumerate(map(checked_call, said.calls))
    ]
    return replace(said, calls=tuple(calls))
