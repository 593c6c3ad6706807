"""An algorithm from outside this package, by the name of its class."""

import importlib
import sys
from pathlib import Path

from rlhf.algorithms.base import Algorithm
from rlhf.config.algo import CustomSection
from rlhf.errors import ConfigError

METHODS = ("keep", "select", "credit", "objectives", "after_pass", "state", "restore")


def custom(section: CustomSection) -> Algorithm:
    """Import `module:Class`, also from the folder that the run was started in, and make it from its section.

    Raises ConfigError where it cannot be imported or is no `Algorithm`. What the class's own constructor raises is its
    own business and passes.
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
    missing = [method for method in METHODS if not callable(dict(_members(found)).get(method))]
    if missing:
        raise ConfigError(f"algo.algorithm: {section.algorithm} has no {', '.join(missing)}; see Algorithm.")
    algorithm: Algorithm = found(section)
    return algorithm


def _members(found: type) -> list[tuple[str, object]]:
    """What the class and its bases define; the nearest definition comes last."""
    return [item for base in reversed(found.__mro__) for item in vars(base).items()]
