"""What to learn: algorithms as pure functions and small classes on tensors. No I/O, no processes, no engines."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from rlhf.algorithms.needs import CLASSES
from rlhf.config.algo import AlgorithmSection

if TYPE_CHECKING:
    from rlhf.algorithms.base import Algorithm


def build_algorithm(section: AlgorithmSection) -> "Algorithm":
    """The algorithm that a config section describes; driver and workers each build their own. What one needs is known
    without it (`needs.py`)."""
    return algorithm_class(section.type)(section)


def algorithm_class(section_type: str) -> "Callable[..., Algorithm]":
    """What makes an algorithm from its section. Its module, which imports torch, is imported here."""
    module, _, name = CLASSES[section_type].partition(":")
    made: Callable[..., Algorithm] = getattr(import_module(f"rlhf.algorithms.{module}"), name)
    return made
