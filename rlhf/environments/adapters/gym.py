"""Environments of gymnasium that can be read and played in text: `gym://FrozenLake-v1?is_slippery=false`."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence

import gymnasium
from gymnasium import spaces

from rlhf.environments.adapters import with_options
from rlhf.environments.environment import Result
from rlhf.types import Json

INTEGER = re.compile(r"-?\d+")
HIGHLIGHTED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m", re.DOTALL)
"""How drawings mark a place, as where the player stands."""


def environment(what: str) -> type:
    """An environment by its id, with options of `gymnasium.make`. Raises ValueError where it cannot be made, or takes
    actions that no text is read as."""
    name, options = with_options(what)
    try:
        spec = gymnasium.spec(name)
        modes = _render_modes(name, options)
        if "ansi" in modes:
            options.setdefault("render_mode", "ansi")
        actions = gymnasium.make(name, **options).action_space
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(actions, spaces.Discrete | spaces.MultiDiscrete | spaces.Text):
        raise ValueError(f"{spec.id} takes actions of {type(actions).__name__}, which are not read from text")

    class GymEnvironment:
        """One environment, as one that steps through the turns."""

        def reset(self, messages: Sequence[Json] = (), seed: int | None = None) -> str:
            """The same row begins the same, so that responses to it can be compared: by its column `seed`, else by its
            prompt."""
            self._env = gymnasium.make(name, **options)
            self._num_unread = 0
            prompt = json.dumps(messages, sort_keys=True).encode()
            observation, _ = self._env.reset(seed=zlib.crc32(prompt) if seed is None else seed)
            return f"{self._shown(observation)}\n{_asked(actions)}"

        def step(self, text: str) -> Result:
            """Take the action that a text ends with. A text with none asks again."""
            action = _action(actions, text)
            if action is None:
                self._num_unread += 1
                return Result(_asked(actions), info={"unread_actions": self._num_unread})
            observation, reward, terminated, truncated, info = self._env.step(action)
            return Result(self._shown(observation), float(reward), terminated, truncated, self._counted(info))

        def close(self) -> None:
            self._env.close()

        def _counted(self, info: Mapping[str, object]) -> Mapping[str, object]:
            return {**info, "unread_actions": self._num_unread} if self._num_unread else info

        def _shown(self, observation: object) -> str:
            """What the environment draws as text, where it does, else what it observes."""
            drawn = self._env.render() if options.get("render_mode") == "ansi" else None
            return HIGHLIGHTED.sub(r"[\1]", drawn) if isinstance(drawn, str) else str(observation)

    return GymEnvironment


def _render_modes(name: str, options: dict[str, Json]) -> Sequence[str]:
    env = gymnasium.make(name, **options)
    modes: Sequence[str] = env.metadata.get("render_modes", ())
    env.close()
    return modes


def _action(actions: object, text: str) -> object:
    """The action that a text names with its last numbers, or that it is; None where it is none."""
    if isinstance(actions, spaces.Text):
        return text.strip() if actions.contains(text.strip()) else None
    numbers = [int(found) for found in INTEGER.findall(text)]
    if isinstance(actions, spaces.Discrete):
        return numbers[-1] if numbers and actions.contains(numbers[-1]) else None
    assert isinstance(actions, spaces.MultiDiscrete), "`environment` refuses others"
    last = actions.dtype.type(numbers[-len(actions.nvec) :]) if len(numbers) >= len(actions.nvec) else None
    return last if last is not None and actions.contains(last) else None


def _asked(actions: object) -> str:
    """What a turn is to end with."""
    if isinstance(actions, spaces.Discrete):
        first = int(actions.start)
        return f"Say an action: a number from {first} to {first + int(actions.n) - 1}."
    if isinstance(actions, spaces.MultiDiscrete):
        return f"Say an action: {len(actions.nvec)} numbers, each from 0 and below {actions.nvec.tolist()}."
    return "Say an action."
