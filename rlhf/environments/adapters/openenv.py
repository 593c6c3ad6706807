"""Environments that an OpenEnv server runs: `openenv://127.0.0.1:8000?action=message&observation=echoed_message`.

Speaks the protocol of OpenEnv's clients over a WebSocket. Their own package imports a web interface, which takes longer
than a process of environments has to start.
"""

import json
from collections.abc import Mapping

from websockets.asyncio.client import ClientConnection, connect

from rlhf.environments.adapters import with_options
from rlhf.environments.environment import Result
from rlhf.types import Json

OPTIONS = {"action", "observation", "secure"}
MAX_MESSAGE_BYTES = 100 * 2**20


def environment(what: str) -> type:
    """The environment of a server, by its address. Each response has a connection of its own, and so an environment.

    `action` is the field of an action that gets a turn's text; without it the text is the action, a JSON object.
    `observation` is the field that the policy reads; without it, it reads all of the observation. `secure=true` is for
    a server behind TLS. Raises ValueError for other options.
    """
    address, options = with_options(what)
    if unknown := sorted(options.keys() - OPTIONS):
        raise ValueError(f"no option {unknown[0]}; have {', '.join(sorted(OPTIONS))}")
    url = f"{'wss' if options.get('secure') is True else 'ws'}://{address}/ws"
    action, observed = options.get("action"), options.get("observation")

    class OpenEnvEnvironment:
        """One connection, as an environment that steps through the turns."""

        async def reset(self, seed: int | None = None, options: Mapping[str, Json] | None = None) -> str:
            """The columns `seed` and `options` (an object) are what the server's reset gets."""
            self._num_unread = 0
            self._connection = await connect(url, max_size=MAX_MESSAGE_BYTES, proxy=None)
            given: dict[str, Json] = {} if seed is None else {"seed": seed}
            given |= options or {}
            found = await _asked(self._connection, {"type": "reset", "data": given})
            return self._read(found["observation"])

        async def step(self, text: str) -> Result:
            """Take an action. A text that is none is told so."""
            taken: dict[str, Json] | None = {str(action): text} if action is not None else _object(text)
            if taken is None:
                self._num_unread += 1
                return Result("Say an action: a JSON object.", info={"unread_actions": self._num_unread})
            found = await _asked(self._connection, {"type": "step", "data": taken})
            reward = found.get("reward")
            given = float(reward) if isinstance(reward, int | float) else None
            return Result(self._read(found["observation"]), given, terminated=bool(found.get("done")))

        async def close(self) -> None:
            await self._connection.send(json.dumps({"type": "close"}))
            await self._connection.close()

        def _read(self, observation: Json) -> str:
            """An observation as text, without what is none."""
            if not isinstance(observation, dict):
                return str(observation)
            if observed is not None:
                return str(observation[str(observed)])
            return json.dumps({key: value for key, value in observation.items() if value is not None})

    return OpenEnvEnvironment


async def _asked(connection: ClientConnection, message: dict[str, Json]) -> dict[str, Json]:
    """What a server answers. Raises RuntimeError with its words where that is an error."""
    await connection.send(json.dumps(message))
    answer = json.loads(await connection.recv())
    data: dict[str, Json] = answer.get("data") or {}
    if answer.get("type") == "error":
        raise RuntimeError(f"the server says: {data.get('message', 'an error without words')}")
    return data


def _object(text: str) -> dict[str, Json] | None:
    """The JSON object that a text is, or that it ends with after other words."""
    start = text.find("{")
    try:
        value = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
