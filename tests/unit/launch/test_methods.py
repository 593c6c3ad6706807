"""Every method has what a run needs."""

import pytest

from rlhf.algorithms import algorithm_class
from rlhf.config.commands import METHODS, OnlineConfig, RowKind
from rlhf.orchestrator.data.kinds import OFFLINE_ROWS, ROWS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_complete(name: str) -> None:
    method = METHODS[name]
    assert callable(algorithm_class(name))
    assert method.summary
    assert method.model in method.config().models  # type: ignore[call-arg]
    if not issubclass(method.config, OnlineConfig):
        assert method.rows in OFFLINE_ROWS


@pytest.mark.parametrize("kind", RowKind)
def test_a_kind_of_rows_is_complete(kind: RowKind) -> None:
    assert ROWS[kind].holds
