"""Paths in a config."""

from os.path import expanduser
from typing import Annotated

from pydantic import AfterValidator

# Not Path.expanduser: a path must stay the text that was given, such as ./model or the name of a model on the hub.
PathText = Annotated[str, AfterValidator(expanduser)]
"""A path, in which `~` at the beginning is the user's home folder. A shell replaces it only at the beginning of a word:
not in a YAML file, and not in --run.dir=~/runs."""
