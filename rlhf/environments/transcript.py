"""A response as its segments: conversations that the model read one by one."""

from collections.abc import Sequence

import numpy as np

from rlhf.engines.base import Tokenizer
from rlhf.environments.calls import NO_CALLS, CallFormat, Said
from rlhf.environments.conversation import Conversation
from rlhf.types import ExpertArray, FinishReason, Json, Message, Prompt, Rollout


class Transcript:
    """Joins the segments of a response: the first one's tokens after the row's prompt, then each later one's prompt and
    tokens. All of them are one response with one reward, and what stands in front of a segment's turns is masked.

    The template of Qwen 3 leaves out what the model thought before the user's last message. A game's second turn is
    then a segment of its own: its prompt is the conversation without the first turn's thoughts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        tools: Sequence[Json],
        kind: type[Conversation] = Conversation,
        form: CallFormat = NO_CALLS,
    ) -> None:
        first = kind.of_prompt(tokenizer, prompt, tools, form)
        self.segments = [first]
        self._given = list(first.messages)
        self._last = first
        """The segment whose turn was the last one."""

    @property
    def current(self) -> Conversation:
        """The segment that began last."""
        return self.segments[-1]

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said after the prompt, in the segment that had the last turn; of one that began with other messages
        than the prompt's, all of those."""
        said, given = self._last.messages, self._given
        return tuple(said[len(given) :] if said[: len(given)] == given else said)

    def add_turn(self, talk: Conversation, rollout: Rollout, *, is_learned: bool = True) -> tuple[str, Said]:
        """Add a turn to one of the segments, as `Conversation.add_turn` does."""
        self._last = talk
        return talk.add_turn(rollout, is_learned=is_learned)

    @property
    def num_world_tokens(self) -> int:
        """Tokens that the model did not write, or that are not learned from. The row's prompt does not count."""
        own = sum(int(np.count_nonzero(segment.own)) for segment in self.segments)
        return self.num_tokens - len(self.segments[0].prompt_ids) - own

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments with their prompts: what learning from the response takes."""
        return sum(len(segment.prompt_ids) + len(segment) for segment in self.segments)

    def room(self, talk: Conversation, context: int, max_tokens: int, reserved: int = 0) -> int:
        """How many tokens a conversation, of this response or not yet, may still get: it may have `context`, and all
        segments together `max_tokens`, if that is more. Turns under way of others may get `reserved` of these."""
        others = sum(len(one.prompt_ids) + len(one) for one in self.segments if one is not talk)
        return min(context, max(max_tokens, context) - others - reserved) - len(talk.prompt_ids) - len(talk)

    @property
    def turn_ends(self) -> tuple[int, ...]:
        """The index of each turn's last token in the response."""
        return tuple(start + len(turn.token_ids) - 1 for start, turn in self._turns())

    def rollout(self, request_id: str, prompt_id: str, finish_reason: FinishReason) -> Rollout:
        """The response so far. Its age is that of its oldest token."""
        heads = self._heads()
        own = np.concatenate([np.pad(one.own, (head, 0)) for head, one in zip(heads, self.segments, strict=True)])
        log_probs = [np.pad(one.log_probs, (head, 0)) for head, one in zip(heads, self.segments, strict=True)]
        ids = [part for one in self.segments for part in (one.prompt_ids, one.token_ids)][1:]
        oldest = min((turn.weight_version for _, turn in self._turns()), default=-1)
        newest, num_older = self._newest()
        return Rollout(
            id=request_id,
            prompt_id=prompt_id,
            token_ids=np.concatenate(ids).astype(np.int64, copy=False),
            finish_reason=finish_reason,
            loss_mask=None if own.all() else own,
            segment_starts=tuple(self._starts()[1:]),
            log_probs=np.concatenate(log_probs).astype(np.float32, copy=False),
            weight_version=oldest,
            num_older_tokens=num_older,
            newest_version=newest,
            routed_experts=self._routed_experts(),
        )

    def _routed_experts(self) -> ExpertArray | None:
        """Of the row's prompt and all tokens of the response; None where no segment has any."""
        given = [(one, one.routed_experts) for one in self.segments]
        like = next((experts for _, experts in given if experts is not None), None)
        if like is None:
            return None
        unknown = np.full((1, *like.shape[1:]), np.iinfo(like.dtype).max, dtype=like.dtype)
        return np.concatenate(
            [
                unknown.repeat(len(one.prompt_ids) + len(one), axis=0) if experts is None else experts
                for one, experts in given
            ]
        )

    def _heads(self) -> list[int]:
        """How many tokens of the response each segment's prompt is: the row's prompt is none of them."""
        return [0, *(len(one.prompt_ids) for one in self.segments[1:])]

    def _starts(self) -> list[int]:
        """Where each segment begins in the response."""
        sizes = [head + len(one) for head, one in zip(self._heads(), self.segments, strict=True)]
        return [sum(sizes[:n]) for n in range(len(sizes))]

    def _turns(self) -> list[tuple[int, Rollout]]:
        """Where each turn begins in the response, and what was sampled."""
        return [
            (start + head + turn.start, turn.rollout)
            for start, head, one in zip(self._starts(), self._heads(), self.segments, strict=True)
            for turn in one.turns
        ]

    def _newest(self) -> tuple[int, int]:
        """The newest version that sampled a token, and how many tokens stand before those that it alone sampled."""
        turns = self._turns()
        newest = max((max(turn.weight_version, turn.newest_version) for _, turn in turns), default=-1)
        num_older, follows_older = 0, False
        for start, turn in turns:
            num_older = start if follows_older else num_older
            follows_older = turn.weight_version != newest
            if follows_older and turn.newest_version == newest:
                num_older, follows_older = start + turn.num_older_tokens, False
            elif follows_older:
                num_older = start + len(turn.token_ids)
        return newest, num_older
