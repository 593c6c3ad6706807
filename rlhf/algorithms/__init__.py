"""What to learn: algorithms as pure functions and small classes on tensors. No I/O, no processes, no engines."""

from typing import TYPE_CHECKING

from rlhf.config.algo import AlgorithmSection

if TYPE_CHECKING:
    from rlhf.algorithms.base import Algorithm


def build_algorithm(section: AlgorithmSection) -> "Algorithm":
    """The algorithm that a config section describes; driver and workers each build their own. What one needs is known
    without it (`needs.py`)."""
    from rlhf.algorithms.registry import ALGORITHMS  # noqa: PLC0415  imports torch

    return ALGORITHMS[section.type](section)
