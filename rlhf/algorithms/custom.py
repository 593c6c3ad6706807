"""An algorithm from outside this package, by the name of its class."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rlhf.algorithms.base import Algorithm
from rlhf.config.algo import CustomSection
from rlhf.errors import ConfigError


def custom(section: CustomSection) -> Algorithm:
    """Import `module:Class`, also from the folder that the run was started in, and make it from its section.

    Raises ConfigError where it cannot be imported or is not a complete `Algorithm`. What the class's own constructor
    raises passes through.
    """
    module, _, name = section.algorithm.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise ConfigError(f"algo.algorithm: {module} cannot be imported: {error}.") from error
    if not isinstance(found, type):
        raise ConfigError(f"algo.algorithm: {module} has no class {name}.")
    if not issubclass(found, Algorithm):
        raise ConfigError(f"algo.algorithm: {section.algorithm} is not an Algorithm; derive it from rlhf.Algorithm.")
    if found.__abstractmethods__:
        raise ConfigError(f"algo.algorithm: {section.algorithm} has no {', '.join(sorted(found.__abstractmethods__))}.")
    make = cast(Callable[[CustomSection], Algorithm], found)
    algorithm = make(section)
    if not any("needs" in vars(holder) for holder in (algorithm, *found.__mro__)):
        raise ConfigError(f"algo.algorithm: {section.algorithm} does not set `needs` in its constructor.")
    return algorithm
