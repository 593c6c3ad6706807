"""What tests of the gloo medium share."""

from collections.abc import Iterator

import pytest
import torch

from tests.unit.engines.weight_sync.gloo_support import Cleanup, Model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def cleanup() -> Iterator[Cleanup]:
    opened: Cleanup = []
    yield opened
    for each in opened:
        each.close()
