"""The worked examples in docstrings are true."""

import doctest
from types import ModuleType

import pytest

from rlhf import episode, types
from rlhf.algorithms import advantages, losses
from rlhf.orchestrator.step import batching


@pytest.mark.parametrize(
    ("module", "num_lines"), [(types, 4), (batching, 6), (losses, 1), (advantages, 1), (episode, 2)]
)
def test_examples_in_docstrings(module: ModuleType, num_lines: int) -> None:
    assert doctest.testmod(module) == (0, num_lines)
