"""Names of environments and agents: a class or function of the user's own, or one of another library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from rlhf.config.import_name import import_name

LIBRARIES: Mapping[str, str | None] = {"gym": "gymnasium", "openenv": "websockets", "openrlhf": None}
"""What stands before `://` in an environment's name: the package that it needs, if any. Each is an extra of this
project."""
AGENT_LIBRARIES: Mapping[str, str | None] = {"verifiers": "verifiers"}
"""The same of an agent's name."""


def environment_name(name: str) -> str:
    """`module:name` as `import_name`, or `LIBRARY://WHAT`.

    Raises:
        ValueError: it is neither, or there is no such file.
    """
    return _named(name, LIBRARIES)


def agent_name(name: str) -> str:
    """The same of an agent.

    Raises:
        ValueError: it is neither.
    """
    return _named(name, AGENT_LIBRARIES)


def needed_package(library: str) -> str | None:
    """The package that the names of a library need, if any."""
    return {**LIBRARIES, **AGENT_LIBRARIES}[library]


def _named(name: str, libraries: Mapping[str, str | None]) -> str:
    library, separator, what = name.partition("://")
    if not separator:
        return import_name(name)
    if library not in libraries:
        for key, others in (("environment", LIBRARIES), ("agent", AGENT_LIBRARIES)):
            if library in others:
                raise ValueError(f'"{library}" is for rollout.{key}; set {name} there.')
        raise ValueError(f'no library "{library}" (have {", ".join(libraries)}).')
    if not what:
        raise ValueError(f'need {library}://NAME (got "{name}").')
    if library == "openrlhf" and not Path(what).is_file():
        raise ValueError(f"no such file: {what} (in {Path.cwd()}).")
    return name


def writes_raw_text(environment: str) -> bool:
    """Whether an environment writes all text between turns itself, so that no chat template is needed."""
    return environment.startswith("openrlhf://")


EnvironmentName = Annotated[str, AfterValidator(environment_name)]
"""An environment of the user's own or of a library."""
AgentName = Annotated[str, AfterValidator(agent_name)]
"""A loop of the user's own, or an environment of a library that runs the episodes itself."""
