"""What an engine makes of the answers of vLLM's processes, without any."""

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import WeightSyncError
from tests.integration.rollout_support import HAS_VLLM, IGNORE_VLLM_IMPORT_WARNINGS

if HAS_VLLM:
    with warnings.catch_warnings(action="ignore"):  # importing vLLM warns
        from rlhf.engines.rollout import vllm_core
        from rlhf.engines.rollout.vllm_core import VllmCore

pytestmark = [
    *IGNORE_VLLM_IMPORT_WARNINGS,
    pytest.mark.timeout(60),
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
]


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


def core_of(workers: Sequence[Any]) -> "VllmCore":
    core: Any = VllmCore.__new__(VllmCore)

    def collective_rpc(method: str | Callable[..., object], args: Sequence[object] = ()) -> list[object]:
        """As vLLM's: an error ends it before the other answers are read."""
        found = []
        for worker in workers:
            found.append(method(worker, *args) if callable(method) else getattr(worker, method)(*args))
            assert not isinstance(found[-1], Exception), "vLLM takes it for an error of the call"
        return found

    core.llm = SimpleNamespace(collective_rpc=collective_rpc)
    core._records = True
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


def test_experts_of_all_stages_are_those_of_a_request() -> None:
    """In the order of the layers; of the workers of a stage one says them."""
    first, last = np.arange(8).reshape(2, 2, 2), np.arange(8, 12).reshape(2, 1, 2)
    stages: list[Any] = [{"a": first, "b": first[:1]}, None, {"a": last, "b": last[:1]}, None]
    workers = [SimpleNamespace(take_routes=lambda _ids, said=said: said) for said in stages]
    found = core_of(workers)._routes(["a", "b"])
    assert found["a"].shape == (2, 3, 2)
    assert found["a"].tolist() == [[[0, 1], [2, 3], [8, 9]], [[4, 5], [6, 7], [10, 11]]]
    assert found["b"].tolist() == [[[0, 1], [2, 3], [8, 9]]]


@pytest.mark.parametrize(("is_first", "has_room", "makes"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_a_later_stage_gets_room_for_what_the_earlier_one_sends(
    is_first: bool, has_room: bool, makes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless vLLM made it, which it does where it warms up."""
    asked: list[dict[str, object]] = []

    def made(**sizes: object) -> str:
        asked.append(sizes)
        return "made"

    model = SimpleNamespace(make_empty_intermediate_tensors=made)
    runner = SimpleNamespace(
        intermediate_tensors="there" if has_room else None,
        get_model=lambda: model,
        max_num_tokens=5,
        model_config=SimpleNamespace(dtype=torch.float32),
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(vllm_core, "get_pp_group", lambda: SimpleNamespace(is_first_rank=is_first))
    worker: Any = SimpleNamespace(model_runner=runner)
    vllm_core._make_room_for_inputs(worker)
    assert asked == [{"batch_size": 5, "dtype": torch.float32, "device": torch.device("cpu")}] * makes
    assert runner.intermediate_tensors == ("made" if makes else "there" if has_room else None)
