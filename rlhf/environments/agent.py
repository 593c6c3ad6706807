"""What a user's own loop gets, in the process that runs it."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rlhf.environments.environment import Result
from rlhf.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSession:
    """One episode's access to the policy: an endpoint of OpenAI's and Anthropic's shape, for any client of theirs.

    Every request at `base_url` is part of this episode, and what the policy answers is learned from.
    """

    base_url: str
    """For OpenAI's clients and Anthropic's. It holds the session's secret: nobody else can reach it."""
    api_key: str = "unused"
    """For clients that need one."""
    model: str = "policy"
    """For clients that need a name; any other will do."""


Agent = Callable[[AgentSession, dict[str, Json]], Awaitable[float | Result | None]]
"""A user's own loop. Gets the columns of its row, and returns the reward of the episode."""


class AgentError(ValueError):
    """Something cannot be a loop. Says why."""


def require_agent(found: object) -> Agent:
    """Check `async def run(session, row)`. Raises AgentError."""
    if not inspect.iscoroutinefunction(found):
        kind = "a function without async" if inspect.isroutine(found) else f"of type {type(found).__name__}"
        raise AgentError(f"it is {kind}, and not async def run(session, row)")
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as error:
        raise AgentError(f"it is called as run(session, row) ({error})") from error
    return found
