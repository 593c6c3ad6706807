"""Names of the user's own functions and classes in a config: `module:name`, what other processes import."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
IN_FILE = re.compile(r"(?P<path>.+)\.py:(?P<name>[A-Za-z_][\w.]*)")


def import_name(name: str) -> str:
    """`module:name`, given so or by the file below the working directory: `folder/file.py:name`.

    Raises:
        ValueError: it is neither, or there is no such file that a process started in this folder can import.
    """
    named = IN_FILE.fullmatch(name)
    if named is None:
        if NAMED.fullmatch(name) is None:
            raise ValueError(f'need module:name or file.py:name (got "{name}").')
        return name
    file = Path(f"{named['path']}.py")
    here = Path.cwd()
    if not file.is_file():
        raise ValueError(f"no such file: {file} (in {here}).")
    try:
        parts = (here / file).resolve().relative_to(here.resolve()).with_suffix("").parts
    except ValueError as error:
        folder = (here / file).resolve().parent
        raise ValueError(f"{file} is not below this folder, {here}. Run this in {folder}.") from error
    if odd := next((part for part in parts if not part.isidentifier()), None):
        raise ValueError(f'"{odd}" in {file} is no name that Python can import. Rename it.')
    return f"{'.'.join(parts)}:{named['name']}"


ImportName = Annotated[str, AfterValidator(import_name)]
"""A function or class of the user's own."""
