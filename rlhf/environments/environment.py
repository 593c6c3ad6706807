"""What a user writes: an environment, and what it returns."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

from rlhf.environments.tools import Function, Tool, ToolError, make_tool

OWN_METHODS = frozenset({"reset", "step", "reward", "close"})
"""Methods that mean something by themselves. The other public methods of an environment are tools."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool or an environment returns, with gymnasium's meaning. Anything else that one returns is an
    observation alone; five values are taken as these five."""

    observation: object = ""
    """What the model reads: text, or a value that is written as JSON."""
    reward: float | None = None
    """Added to the reward of the episode."""
    terminated: bool = False
    """The task is over: solved or failed."""
    truncated: bool = False
    """The episode is cut off for a reason outside of the task. The response counts as truncated."""
    info: Mapping[str, object] = field(default_factory=dict)
    """Numbers in it are reported beside the reward."""


class Environment(Protocol):
    """One episode's world. It is built for each response, without arguments, and closed after it.

    Either it has `step(text)`, which gets the text of each of the model's turns (a game), or its public methods are
    tools. `reward()` and `close()` are optional. Every method may be async. Each runs outside of the training process.
    """

    def reset(self, **row: object) -> object:
        """Begin. Gets the columns of the row by name. Returns None, or the text of the first user's turn."""
        ...


class EnvironmentClassError(ValueError):
    """A class cannot be an environment. Holds everything that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentClass:
    """An environment's class, inspected."""

    build: Callable[[], object]
    tools: Mapping[str, Tool]
    """Its methods that the model may call. Their functions take the environment first."""
    steps: bool
    """Whether it gets the text of each turn."""
    rewards: bool
    """Whether it has a reward at the end."""
    required: tuple[str, ...]
    """Columns that `reset` must get."""
    optional: tuple[str, ...]
    takes_rest: bool
    """Whether `reset` gets every column."""
    raw_text: bool
    """Whether it writes all text between turns itself."""


def inspect_class(found: object) -> EnvironmentClass:
    """A class as an environment. Raises EnvironmentClassError with everything that is wrong with it."""
    if not inspect.isclass(found):
        raise EnvironmentClassError([f" is of type {type(found).__name__}, not a class"])
    problems: list[str] = []
    methods = {name: method for name, method in _methods(found).items() if not name.startswith("_")}
    steps = "step" in methods
    tools: dict[str, Tool] = {}
    for name, method in methods.items():
        if steps or name in OWN_METHODS:
            continue
        try:
            tools[name] = make_tool(method, is_method=True)
        except ToolError as error:
            problems.append(f".{name}: {error} (begin the name with _ if it is no tool)")
    if "reset" not in methods:
        problems.append(" has no method reset(self, **row)")
    problems += _wrong_signatures(found, methods)
    if problems:
        raise EnvironmentClassError(problems)
    columns = list(inspect.signature(methods["reset"]).parameters.values())[1:]
    named = [p for p in columns if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return EnvironmentClass(
        build=found,
        tools=tools,
        steps=steps,
        rewards="reward" in methods,
        required=tuple(p.name for p in named if p.default is p.empty),
        optional=tuple(p.name for p in named if p.default is not p.empty),
        raw_text=bool(getattr(found, "raw_text", False)),
        takes_rest=any(p.kind is p.VAR_KEYWORD for p in columns),
    )


def as_result(value: object) -> Result:
    """What a tool or an environment returned as a Result."""
    if not is_result(value):
        return Result(observation=value)
    return value if isinstance(value, Result) else Result(*value)


def is_result(value: object) -> TypeGuard[Result | tuple[object, float | None, bool, bool, Mapping[str, object]]]:
    """Whether it is more than an observation: a Result, or its five values."""
    return isinstance(value, Result) or (isinstance(value, tuple) and len(value) == 5 and isinstance(value[4], Mapping))


def _methods(found: type) -> dict[str, Function]:
    return {name: method for name, method in inspect.getmembers_static(found) if inspect.isfunction(method)}


def _wrong_signatures(found: type, methods: Mapping[str, Function]) -> list[str]:
    """What is wrong with how an environment is built, stepped and asked for its reward."""
    given = {"__init__": 0, "step": 1, "reward": 0, "close": 0}
    wanted = {"__init__": "(self)", "step": "(self, text)", "reward": "(self)", "close": "(self)"}
    problems = []
    for name, count in given.items():
        method = methods.get(name) if name != "__init__" else _methods(found).get(name)
        if method is None:
            continue
        try:
            inspect.signature(method).bind(*[None] * (count + 1))
        except TypeError as error:
            problems.append(f".{name} is called as {name}{wanted[name]} ({error})")
    return problems
