"""Environments that an OpenEnv server runs: `openenv://127.0.0.1:8000?action=message&observation=echoed_message`."""

import json
from collections.abc import Mapping
from typing import Any

from openenv.core.generic_client import GenericEnvClient

from rlhf.environments.adapters import with_options
from rlhf.environments.environment import Result

OPTIONS = {"action", "observation", "secure"}


def environment(what: str) -> type:
    """The environment of a server, by its address. Each response has a connection of its own, and so an environment.

    `action` is the field of an action that gets a turn's text; without it the text is the action, a JSON object.
    `observation` is the field that the policy reads; without it, it reads all of the observation. `secure=true` is for
    a server behind TLS. Raises ValueError for other options.
    """
    address, options = with_options(what)
    if unknown := sorted(options.keys() - OPTIONS):
        raise ValueError(f"no option {unknown[0]}; have {', '.join(sorted(OPTIONS))}")
    url = f"{'https' if options.get('secure') is True else 'http'}://{address}"
    action, observed = options.get("action"), options.get("observation")

    class OpenEnvEnvironment:
        """One connection, as an environment that steps through the turns."""

        async def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> str:
            """The columns `seed` and `options` (an object) are what the server's reset gets."""
            self._client = GenericEnvClient(base_url=url)
            given = {} if seed is None else {"seed": seed}
            return self._read((await self._client.reset(**given, **(options or {}))).observation)

        async def step(self, text: str) -> Result:
            """Take an action. A text that is none is told so."""
            taken = {str(action): text} if action is not None else _object(text)
            if taken is None:
                return Result("Say an action: a JSON object.", info={"unread_actions": 1})
            result = await self._client.step(taken)
            return Result(self._read(result.observation), result.reward, terminated=result.done)

        async def close(self) -> None:
            await self._client.close()

        def _read(self, observation: Mapping[str, Any]) -> str:
            """An observation as text, without what is none."""
            if observed is not None:
                return str(observation[str(observed)])
            return json.dumps({key: value for key, value in observation.items() if value is not None})

    return OpenEnvEnvironment


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or that it ends with after other words."""
    start = text.find("{")
    try:
        value = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
