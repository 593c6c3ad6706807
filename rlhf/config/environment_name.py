"""Names of environments: a class of the user's own, or one of another library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from rlhf.config.import_name import import_name

LIBRARIES: Mapping[str, str | None] = {"gym": "gymnasium", "openenv": "websockets", "openrlhf": None}
"""What stands before `://`: the package that it needs, if any. Each is an extra of this project."""


def environment_name(name: str) -> str:
    """`module:name` as `import_name`, or `LIBRARY://WHAT`.

    Raises:
        ValueError: it is neither, or there is no such file.
    """
    library, separator, what = name.partition("://")
    if not separator:
        return import_name(name)
    if library not in LIBRARIES:
        raise ValueError(f'no library "{library}" (have {", ".join(LIBRARIES)}).')
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
