"""Which tools and environments a run has, and what is known of them once they are loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.types import Json

COLUMN = "environment"
"""The column that says which of several environments a row is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSpec:
    """What a process that runs the user's code loads."""

    tools: tuple[str, ...] = ()
    """Functions, `module:name`."""
    environments: tuple[str, ...] = ()
    """Classes, `module:name`."""
    agent: str | None = None
    """A user's own loop, `module:name`."""
    memory_gib: float | None = None
    """Most memory that a process may allocate."""
    network: bool = True
    """Whether the user's code reaches the network."""
    max_processes: int = 256
    """Most processes that may descend from one."""

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return self.agent or ", ".join(self.environments or self.tools)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeWorld:
    """What is known of what one episode meets: tools, and an environment where the run has any."""

    environment: str = ""
    """The environment's class or the user's own loop, `module:name`; empty where there is none."""
    runs: bool = False
    """Whether it is a loop."""
    tools: tuple[Json, ...]
    """Schemas, as chat templates get them."""
    methods: frozenset[str] = frozenset()
    """Tools that are methods of the environment."""
    steps: bool = False
    """Whether the environment gets the text of each turn."""
    rewards: bool = False
    """Whether the environment has a reward at the end."""
    required: tuple[str, ...] = ()
    """Columns that every row must have."""
    raw_text: bool = False
    """Whether the environment writes all text between turns itself, so that nothing is rendered."""

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The names that calls may have."""
        return tuple(map(_name, self.tools))


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What is known of loaded tools and environments."""

    worlds: tuple[EpisodeWorld, ...]
    """One for each environment; one without environment where a run has tools alone."""

    @property
    def raw_text(self) -> bool:
        """Whether environments write all text between turns: all of a run's, or none."""
        return self.worlds[0].raw_text

    def of(self, row: Mapping[str, Json]) -> EpisodeWorld:
        """What the episodes of a row meet. With several environments the column `environment` names one. Raises
        EnvironmentNameError."""
        if len(self.worlds) == 1:
            return self.worlds[0]
        by_name = {world.environment: world for world in self.worlds}
        return by_name[named_environment(tuple(by_name), row)]


class EnvironmentNameError(ValueError):
    """A row names no environment of the run, where it has several. Says which there are."""


def named_environment(environments: Sequence[str], row: Mapping[str, Json]) -> str:
    """The one of `environments`, each `module:name`, that a row's column `environment` names: by what stands after the
    colon where that is of one alone, or by all of it. Raises EnvironmentNameError."""
    short = [name.partition("://")[2] or name.rpartition(":")[2] for name in environments]
    known = {name: full for name, full in zip(short, environments, strict=True) if short.count(name) == 1}
    known |= {full: full for full in environments}
    given = row.get(COLUMN)
    if isinstance(given, str) and given in known:
        return known[given]
    have = ", ".join(name if short.count(name) == 1 else full for name, full in zip(short, environments, strict=True))
    if given is None:
        raise EnvironmentNameError(f"{COLUMN} is missing, which says which environment a row is for; have {have}.")
    raise EnvironmentNameError(f"{COLUMN} is {json.dumps(given, ensure_ascii=False)[:80]}; have {have}.")


def read_described(hello: Mapping[str, Json]) -> Described:
    """What a process with the user's code says when it has loaded it (`World.described`)."""
    worlds = hello["worlds"]
    assert isinstance(worlds, list), "the process sends a list"
    return Described(worlds=tuple(map(_read_world, worlds)))


def _read_world(value: Json) -> EpisodeWorld:
    assert isinstance(value, dict), "the process sends objects"
    tools = value["tools"]
    assert isinstance(tools, list), "the process sends a list"
    return EpisodeWorld(
        environment=str(value["environment"]),
        runs=bool(value["runs"]),
        tools=tuple(tools),
        methods=frozenset(_texts(value["methods"])),
        steps=bool(value["steps"]),
        rewards=bool(value["rewards"]),
        required=_texts(value["required"]),
        raw_text=bool(value["raw_text"]),
    )


def _texts(value: Json) -> tuple[str, ...]:
    assert isinstance(value, list), "the process sends a list"
    return tuple(map(str, value))


def _name(schema: Json) -> str:
    assert isinstance(schema, dict), "schemas are made by make_tool"
    function = schema["function"]
    assert isinstance(function, dict), "schemas are made by make_tool"
    return str(function["name"])
