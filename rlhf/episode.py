"""Responses of several turns: what the model wrote, and what tools and environments returned in between."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Self

from rlhf.types import Message, Rollout


class Ending(StrEnum):
    """Why an episode ended."""

    ANSWER = "answer"
    """The model's last turn called no tool."""
    TERMINATED = "terminated"
    """The environment said that it is over."""
    TRUNCATED = "truncated"
    """The environment said that it was cut off."""
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    """The model's turn, or what came back for it, would have exceeded rollout.max_response_tokens."""
    SEALED = "sealed"
    """The chat template would have written the turns before the next one in another way than they were sampled, and
    another segment had no room."""
    ABORTED = "aborted"
    FAILED = "failed"
    """The environment raised, took too long or died, also when it was asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """How a response came about, turn by turn."""

    messages: tuple[Message, ...]
    """What was said after the prompt, as the chat template takes it: the model's turns as text or, where the template
    wants that, with thoughts and calls apart, and what came back. Of several conversations, that
    with the last turn."""
    ending: Ending
    num_turns: int
    """Turns of the model."""
    num_segments: int = 1
    """Conversations that the model read one by one: see `Response.segment_starts`."""
    turn_ends: tuple[int, ...] = ()
    """The index of each turn's last token in the response."""
    turn_rewards: tuple[float, ...] = ()
    """What tools and the environment gave for each turn; for the last one also the reward at the end."""
    calls: Mapping[str, int] = field(default_factory=dict)
    """How often each tool was called."""
    num_calls: int = 0
    """All calls, also those of tools that do not exist and those that could not be read."""
    num_failed_calls: int = 0
    """Calls that raised, took too long, did not fit the tool's parameters, named no tool or could not be read."""
    num_world_tokens: int = 0
    """Tokens of the response that the model did not write."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the `info` that the environment returned last."""
    num_retries: int = 0
    """How often the episode began anew because its environment failed."""
    world_s: float = 0.0
    """Seconds in tools and the environment, of all tries; of a loop, those without a request."""
    failure: str = ""
    """What the environment failed of."""

    @property
    def reward(self) -> float:
        """The sum of what tools and the environment gave."""
        return sum(self.turn_rewards)

    @property
    def answer(self) -> str:
        """The text of the model's last turn, which rewards read."""
        return next((message.content for message in reversed(self.messages) if message.role == "assistant"), "")


def shown(message: Message) -> str:
    """What a message says as a person reads it: its text, then its calls, where a template takes them apart.

    >>> call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    >>> shown(Message(role="assistant", content="", fields={"tool_calls": [call]}))
    '{"name": "add", "arguments": {"a": 1}}'
    """
    calls = message.fields.get("tool_calls")
    functions = [call["function"] for call in (calls if isinstance(calls, list) else []) if isinstance(call, dict)]
    return "\n".join([*([message.content] if message.content or not functions else []), *map(json.dumps, functions)])


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRollout(Rollout):
    """A response of an episode. `loss_mask` is False at the tokens of tools and environments, `log_probs` 0."""

    episode: Episode

    @classmethod
    def of(cls, rollout: Rollout, episode: Episode) -> Self:
        """A response, and how it came about."""
        return cls(**{one.name: getattr(rollout, one.name) for one in fields(Rollout)}, episode=episode)

    @property
    def first(self) -> int:
        """The index of the first token to show: 0, or the first that the model wrote where a loop left the row's prompt
        at once, so that the response begins with a prompt of the loop's."""
        if self.segment_starts[:1] != (0,) or self.loss_mask is None:
            return 0
        return int(self.loss_mask.argmax())
