"""A request of a chat API, and its answer, in no API's own form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.environments.calls import Call
from rlhf.types import FinishReason, Json, Message


class ChatError(Exception):
    """A request is refused. `code` is a word for programs."""

    def __init__(self, text: str, *, code: str = "invalid_request_error", status: int = 400) -> None:
        super().__init__(text)
        self.code = code
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One message of a request, as it is compared with what was said before. `message` is what a chat template reads;
    None for one of the model's own turns, whose tokens are known."""

    role: str
    text: str
    calls: tuple[str, ...] = ()
    """Names and arguments of the tools that it called (`call_key`)."""
    message: Message | None = None

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """Equal for messages that say the same."""
        return self.role, self.text, self.calls


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What a caller asks for. None: as the run samples."""

    messages: tuple[Heard, ...]
    tools: tuple[Json, ...] = ()
    """Schemas {type, function: {name, description, parameters}}."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    with_log_probs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """One of the model's turns."""

    id: str
    text: str
    """What it says besides its calls."""
    calls: tuple[Call, ...]
    """They have ids."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    log_probs: tuple[tuple[str, float], ...] = ()
    """Text and log-prob of each token, if they were asked for."""

    @property
    def heard(self) -> Heard:
        """As a caller gives it back."""
        return Heard(role="assistant", text=self.text, calls=tuple(map(call_key, self.calls)))


def call_key(call: Call) -> str:
    """A call's name and arguments, in a form that does not depend on how the JSON is written."""
    return f"{call.name} {json.dumps(call.arguments, sort_keys=True)}"


def number(body: Mapping[str, Json], name: str, least: float, most: float) -> float | None:
    """A setting of a request. Raises ChatError."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ChatError(f"{name} is {value!r}, need a number from {least:g} to {most:g}")
    return float(value)


def refuse(body: Mapping[str, Json], allowed: Mapping[str, Sequence[Json]]) -> None:
    """Raise ChatError where a setting has another value than those that change nothing."""
    for name, values in allowed.items():
        if name in body and body[name] is not None and body[name] not in values:
            raise ChatError(f"{name} is not supported (got {json.dumps(body[name])[:100]}); leave it out")
