"""What an engine makes of the answers of vLLM's processes, without any."""

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.errors import WeightSyncError
from tests.integration.rollout_support import HAS_VLLM, IGNORE_VLLM_IMPORT_WARNINGS

if not HAS_VLLM:
    pytest.skip("vllm is not installed", allow_module_level=True)

with warnings.catch_warnings(action="ignore"):  # importing vLLM warns
    from rlhf.engines.rollout.vllm_core import VllmCore

pytestmark = [*IGNORE_VLLM_IMPORT_WARNINGS, pytest.mark.timeout(60)]


class Worker:
    """One of vLLM's workers, whose update ends as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self._weight_update_active = False
        self.got: list[object] = []

    def update_weights(self, update_info: object) -> None:
        self._weight_update_active = True
        self.got.append(update_info)
        if self._error is not None:
            raise self._error


def core_of(workers: Sequence[Any]) -> VllmCore:
    core: Any = VllmCore.__new__(VllmCore)

    def collective_rpc(method: str | Callable[..., object], args: Sequence[object] = ()) -> list[object]:
        """As vLLM's: an error ends it before the other answers are read."""
        found = []
        for worker in workers:
            found.append(method(worker, *args) if callable(method) else getattr(worker, method)(*args))
            assert not isinstance(found[-1], Exception), "vLLM takes it for an error of the call"
        return found

    core.llm = SimpleNamespace(collective_rpc=collective_rpc)
    return core  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("errors", "kind", "text"),
    [
        ([WeightSyncError("bucket 2 is wrong"), None], WeightSyncError, "^bucket 2 is wrong"),
        ([None, WeightSyncError("bucket 3 is wrong")], WeightSyncError, "^bucket 3 is wrong"),
        ([None, KeyError("layer")], RuntimeError, "KeyError.'layer'"),
        ([KeyError("one"), KeyError("two")], RuntimeError, "KeyError.'one'"),
    ],
)
def test_a_call_is_over_in_every_process_before_its_error_is_raised(
    errors: Sequence[Exception | None], kind: type[Exception], text: str
) -> None:
    """What was left of it would be taken for answers to the next one, and an update that goes on lets none begin."""
    workers = [Worker(error) for error in errors]
    with pytest.raises(kind, match=text):
        core_of(workers).transfer("update_weights", update_info=7)
    assert [worker.got for worker in workers] == [[7], [7]]
    assert not any(worker._weight_update_active for worker in workers)


def test_a_call_without_errors_leaves_the_update_open() -> None:
    workers = [Worker(), Worker()]
    core_of(workers).transfer("update_weights", update_info=7)
    assert all(worker._weight_update_active for worker in workers)
