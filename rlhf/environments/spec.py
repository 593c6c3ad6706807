"""Which tools and environment a run has, and what is known of them once they are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSpec:
    """What a process that runs the user's code loads."""

    tools: tuple[str, ...] = ()
    """Functions, `module:name`."""
    environment: str | None = None
    """A class, `module:name`."""
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
        return self.agent or self.environment or ", ".join(self.tools)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What is known of loaded tools and an environment."""

    tools: tuple[Json, ...]
    """Schemas, as chat templates get them."""
    methods: frozenset[str]
    """Tools that are methods of the environment."""
    steps: bool
    """Whether the environment gets the text of each turn."""
    rewards: bool
    """Whether the environment has a reward at the end."""
    required: tuple[str, ...]
    """Columns that every row must have."""

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The names that calls may have."""
        return tuple(map(_name, self.tools))


def read_described(hello: Mapping[str, Json]) -> Described:
    """What a process with the user's code says when it has loaded it (`World.described`)."""
    tools = hello["tools"]
    assert isinstance(tools, list), "the process sends a list"
    return Described(
        tools=tuple(tools),
        methods=frozenset(_texts(hello["methods"])),
        steps=bool(hello["steps"]),
        rewards=bool(hello["rewards"]),
        required=_texts(hello["required"]),
    )


def _texts(value: Json) -> tuple[str, ...]:
    assert isinstance(value, list), "the process sends a list"
    return tuple(map(str, value))


def _name(schema: Json) -> str:
    assert isinstance(schema, dict), "schemas are made by make_tool"
    function = schema["function"]
    assert isinstance(function, dict), "schemas are made by make_tool"
    return str(function["name"])
