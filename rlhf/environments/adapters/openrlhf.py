"""The file of OpenRLHF's `--agent_func_path`, as it stands: `openrlhf://agent_func.py`.

Such a file has a class `AgentExecutor`, made for a class of agents whose `reset(states)` and `step(states)` take and
return dictionaries. What an agent returns as feedback is text with all marks of turns in it: nothing is rendered here.
"""

import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from rlhf.environments.environment import Result


def environment(what: str) -> type:
    """The agents of a file. Raises ValueError where it has none, or runs a loop of its own."""
    agent = _agent_class(_module(what), what)

    class OpenRlhfAgent:
        """One agent, as an environment that steps through the turns."""

        raw_text = True

        async def reset(self, prompt_text: str = "", label: str | None = None) -> str | None:
            """The agent's first observation is the prompt; what it adds to it stands before the first turn."""
            self._agent = agent()
            self._label = label
            state = {"observation": prompt_text, "label": label}
            observation = str((await _awaited(self._agent.reset(state)))["observation"])
            if not observation.startswith(prompt_text):
                raise ValueError("reset returned another observation than the prompt, which has been tokenized already")
            self._observation = observation
            return observation[len(prompt_text) :] or None

        async def step(self, text: str) -> Result:
            """Feedback is appended as it is; the rewards of all steps are summed."""
            state = {
                "observation_text": self._observation,
                "action_text": text,
                "label": self._label,
                "sampling_params": None,
            }
            given = await _awaited(self._agent.step(state))
            if given.get("sampling_params") is not None:
                raise ValueError("step returned sampling_params, which cannot change here between turns")
            feedback = str(given["environment_feedback"])
            self._observation += text + feedback
            logs = given.get("extra_logs")
            numbers = {str(name): _number(value) for name, value in logs.items()} if isinstance(logs, Mapping) else {}
            return Result(feedback, _number(given["rewards"]), terminated=bool(given["done"]), info=numbers)

    return OpenRlhfAgent


@cache
def _module(file: str) -> types.ModuleType:
    """A file as a module. Without OpenRLHF, what it imports of that is stood in for."""
    path = Path(file).resolve()
    _stand_in()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"no such file: {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _agent_class(module: types.ModuleType, file: str) -> type:
    executor = getattr(module, "AgentExecutor", None)
    if not inspect.isclass(executor):
        raise ValueError(f"{file} has no class AgentExecutor")
    agent = getattr(executor(), "agent_instance_cls", None)
    if not inspect.isclass(agent):
        raise ValueError(f"AgentExecutor in {file} runs a loop of its own, and is made for no class of agents")
    return agent


def _stand_in() -> None:
    """Modules with the names that such files import, where OpenRLHF is not installed."""
    if "openrlhf" in sys.modules or importlib.util.find_spec("openrlhf") is not None:
        return
    package, utils, agent = (types.ModuleType(name) for name in ("openrlhf", "openrlhf.utils", "openrlhf.utils.agent"))
    package.__path__, utils.__path__ = [], []
    for kind in (AgentExecutorBase, AgentInstanceBase, MultiTurnAgentExecutor):
        setattr(agent, kind.__name__, kind)
    sys.modules |= {module.__name__: module for module in (package, utils, agent)}


class AgentInstanceBase:
    """Stands in for the base of agents."""

    async def reset(self, states: dict[str, object], **kwargs: object) -> dict[str, object]:
        return states


class AgentExecutorBase:
    """Stands in for the base of loops of one's own."""


class MultiTurnAgentExecutor(AgentExecutorBase):
    """Stands in for the loop that this project runs itself."""

    def __init__(self, agent_instance_cls: type) -> None:
        self.agent_instance_cls = agent_instance_cls


async def _awaited(value: object) -> Mapping[str, object]:
    """What a method returned, awaited where it is to be."""
    found = await value if inspect.isawaitable(value) else value
    if not isinstance(found, Mapping):
        raise TypeError(f"it returned {type(found).__name__}, not a dictionary")
    return found


def _number(value: object) -> float:
    """A number, or the one of a tensor."""
    item = getattr(value, "item", None)
    return float(str(item() if callable(item) else value))
