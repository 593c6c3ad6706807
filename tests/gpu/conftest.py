"""What only a GPU can show: `pytest tests/gpu` on a machine that has one, after `pip install '.[gpu,dev]'`."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test of this folder is marked, and says why it waits."""
    waits = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            item.add_marker(waits)
