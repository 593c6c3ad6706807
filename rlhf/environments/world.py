"""The tools and environments of a run, loaded: what the process that runs the user's code does with each request."""

import asyncio
import importlib
import inspect
import json
import math
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import TypeGuard

from rlhf.environments import adapters
from rlhf.environments.agent import Agent, AgentSession, require_agent
from rlhf.environments.environment import (
    EnvironmentClass,
    EnvironmentClassError,
    Result,
    as_result,
    inspect_class,
    is_result,
)
from rlhf.environments.spec import named_environment
from rlhf.environments.tools import CallError, Tool, ToolError, make_tool

CONCURRENCY = 64
"""Calls that a process runs at the same time. More wait where their deadlines have not begun."""
MAX_TEXT = 400_000
"""Characters of an observation that leave the process; the middle of a longer one is left out."""


class LoadError(ValueError):
    """Tools or the environment cannot be loaded. Holds everything that is wrong, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(slots=True, kw_only=True)
class World:
    """Runs the user's code. Sync functions run in threads, async ones in the process's event loop."""

    tools: Mapping[str, Tool]
    """Functions, not the environment's methods."""
    environments: Mapping[str, EnvironmentClass]
    """By their names `module:name`."""
    agent: Agent | None = None
    agent_name: str = ""
    _loops: dict[str, "asyncio.Task[object]"] = field(default_factory=dict)
    """The user's own loops by episode."""
    _opened: dict[str, tuple[EnvironmentClass, object]] = field(default_factory=dict)
    """Environments by episode, each with its class."""
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(CONCURRENCY))

    @classmethod
    def load(cls, tools: Sequence[str], environments: Sequence[str], agent: str | None = None) -> "World":
        """Import functions, classes and a loop by their names `module:name`. Raises LoadError."""
        loaded: dict[str, Tool] = {}
        problems: list[str] = []
        for n, name in enumerate(tools):
            where = f"rollout.tools.{n}: {name}"
            try:
                tool = make_tool(_function(_imported(name)))
            except ValueError as error:
                problems.append(f"{where}: {error}.")
                continue
            if tool.name in loaded:
                problems.append(f"{where}: there is another tool called {tool.name}; rename one.")
            loaded.setdefault(tool.name, tool)
        found: dict[str, EnvironmentClass] = {}
        for name in environments:
            try:
                found[name] = inspect_class(_imported(name))
            except EnvironmentClassError as error:
                problems += [f"rollout.environment: {name}{one}." for one in error.problems]
            except ValueError as error:
                problems.append(f"rollout.environment: {name}: {error}.")
        problems += [
            f"rollout.environment: {environment}.{name} has the name of a tool; rename one."
            for environment, known in found.items()
            for name in sorted(loaded.keys() & known.tools.keys())
        ]
        raw = [name for name, known in found.items() if known.raw_text]
        if raw and (tools or len(raw) < len(found)):
            text = "writes all text between turns itself, and cannot stand beside tools or other kinds of environments"
            problems.append(f"rollout.environment: {raw[0]} {text}.")
        loop = None
        if agent is not None:
            try:
                loop = require_agent(_imported(agent))
            except ValueError as error:
                problems.append(f"rollout.agent: {agent}: {error}.")
        if problems:
            raise LoadError(problems)
        return cls(tools=loaded, environments=found, agent=loop, agent_name=agent or "")

    def described(self) -> dict[str, object]:
        """What another process has to know of it."""
        tools = [tool.schema for tool in self.tools.values()]
        flags = dict.fromkeys(("steps", "rewards", "raw_text"), False)
        none = {"methods": [], "required": [], **flags}
        alone = {"environment": self.agent_name, "runs": self.agent is not None, "tools": tools, **none}
        worlds = [
            {
                "environment": name,
                "runs": False,
                "tools": [*tools, *(tool.schema for tool in found.tools.values())],
                "methods": sorted(found.tools),
                "steps": found.steps,
                "rewards": found.rewards,
                "required": found.required,
                "raw_text": found.raw_text,
            }
            for name, found in self.environments.items()
        ]
        return {"worlds": worlds or [alone]}

    async def answer(self, request: Mapping[str, object]) -> dict[str, object]:
        """The reply to one request. Whatever the user's code raises is in it."""
        operation = self._operations()[str(request["op"])]
        try:
            return await operation(request)
        except CallError as error:
            return {"wrong": str(error)}
        except Exception as error:
            return {"raised": raised(error)}

    def _operations(self) -> Mapping[str, Callable[[Mapping[str, object]], Awaitable[dict[str, object]]]]:
        return {
            "ping": self._ping,
            "open": self._open,
            "call": self._call,
            "step": self._step,
            "reward": self._reward,
            "run": self._run_loop,
            "close": self._close,
        }

    async def _ping(self, request: Mapping[str, object]) -> dict[str, object]:
        return {}

    async def _open(self, request: Mapping[str, object]) -> dict[str, object]:
        row = request["row"]
        assert isinstance(row, dict), "a row is an object"
        names = tuple(self.environments)
        found = self.environments[names[0] if len(names) == 1 else named_environment(names, row)]
        columns = row if found.takes_rest else [name for name in (*found.required, *found.optional) if name in row]
        environment = await self._run(found.build)
        self._opened[str(request["episode"])] = found, environment
        said = await self._run(operator.methodcaller("reset", **{name: row[name] for name in columns}), environment)
        return {"observation": None if said is None else as_text(said)}

    async def _call(self, request: Mapping[str, object]) -> dict[str, object]:
        name = str(request["name"])
        if name in self.tools:
            return replied(await self._run(self.tools[name].bind(request["arguments"])))
        found, owner = self._opened[str(request["episode"])]
        return replied(await self._run(found.tools[name].bind(request["arguments"], owner)))

    async def _step(self, request: Mapping[str, object]) -> dict[str, object]:
        _, environment = self._opened[str(request["episode"])]
        return replied(await self._run(operator.methodcaller("step", request["text"]), environment))

    async def _reward(self, request: Mapping[str, object]) -> dict[str, object]:
        _, environment = self._opened[str(request["episode"])]
        value = await self._run(operator.methodcaller("reward"), environment)
        return {"reward": number(value, "reward()")}

    async def _run_loop(self, request: Mapping[str, object]) -> dict[str, object]:
        assert self.agent is not None, "only loops are run"
        row, episode = request["row"], str(request["episode"])
        assert isinstance(row, dict), "a row is an object"
        session = AgentSession(base_url=str(request["url"]))
        task = self._loops[episode] = asyncio.ensure_future(_awaited(self.agent(session, row)))
        try:
            value = await task
        finally:
            self._loops.pop(episode, None)
        return replied(_loop_result(value))

    async def _close(self, request: Mapping[str, object]) -> dict[str, object]:
        if (loop := self._loops.get(str(request["episode"]))) is not None:
            loop.cancel()
        _, environment = self._opened.pop(str(request["episode"]), (None, None))
        if environment is not None and callable(inspect.getattr_static(environment, "close", None)):
            await self._run(operator.methodcaller("close"), environment)
        return {}

    async def _run(self, function: Callable[..., object], *arguments: object) -> object:
        """Call the user's code, and await what it returns where that is to be awaited."""
        result = await asyncio.get_running_loop().run_in_executor(self._threads, _without_exit, function, *arguments)
        return await _awaited(result) if inspect.isawaitable(result) else result


def replied(value: object) -> dict[str, object]:
    """A reply with what a tool or a step returned."""
    result = as_result(value)
    numbers = {str(key): float(one) for key, one in result.info.items() if is_number(one)}
    return {
        "text": as_text(result.observation),
        "reward": None if result.reward is None else number(result.reward, "Result.reward"),
        "terminated": bool(result.terminated),
        "truncated": bool(result.truncated),
        "info": numbers,
    }


def _loop_result(value: object) -> Result:
    """What a user's own loop returned: nothing, its reward, or a whole result. Raises ValueError for anything else."""
    if value is None:
        return Result()
    return as_result(value) if is_result(value) else Result(reward=number(value, "the reward"))


def as_text(value: object) -> str:
    """A value as the model reads it: text as it is, nothing as none, anything else as JSON."""
    text = (
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    )
    text = _encodable(text)
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}[... {len(text) - MAX_TEXT} characters left out ...]{text[-half:]}"


def _encodable(text: str) -> str:
    """A text without what no tokenizer takes; the rest of it is as good as before."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()


def number(value: object, what: str) -> float:
    """A finite number. Raises ValueError."""
    if not is_number(value):
        raise ValueError(f"{what} is {value!r}, need a finite number")
    return float(value)


def is_number(value: object) -> TypeGuard[Real]:
    """Whether a value is a finite number, of any library."""
    return isinstance(value, Real) and math.isfinite(value)


def raised(error: BaseException) -> str:
    """An exception on one line, without the place in the code, which says nothing to a model."""
    text = _encodable(" ".join(str(error)[:4000].split())[:500])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_exit(function: Callable[..., object], *arguments: object) -> object:
    """Call a function that cannot end the process: `exit()` is an error as any other. So is StopIteration, which no
    future takes."""
    try:
        return function(*arguments)
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(raised(error)) from error


async def _awaited(result: Awaitable[object]) -> object:
    """Await the user's code, which cannot end the process either, nor the task that awaits it."""
    try:
        return await result
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(raised(error)) from error


def _imported(name: str) -> object:
    """What `module:name` or `LIBRARY://WHAT` names. Raises LoadError."""
    if "://" in name:
        return _adapted(name)
    module, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0]):
            raise LoadError([f"no module {module} in this folder or on the Python path"]) from error
        raise LoadError([f"importing {module} raises {raised(error)}"]) from error
    try:
        return operator.attrgetter(path)(found)
    except AttributeError as error:
        raise LoadError([f"{module} has no {path}"]) from error


def _adapted(name: str) -> object:
    try:
        return adapters.load(name)
    except ImportError as error:
        library = name.partition("://")[0]
        raise LoadError([f"{error}; run `pip install 'rlhf[{library}]'`"]) from error
    except BaseException as error:  # the file of an agent may do anything
        said = str(error) if type(error) is ValueError else f"importing it raises {raised(error)}"
        raise LoadError([said]) from error


def _function(found: object) -> Callable[..., object]:
    if not inspect.isroutine(found):
        raise ToolError(f"it is of type {type(found).__name__}, not a function")
    return found
