"""The trainer's stub for the control planes of all rollout engines, over Ray actor calls."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import ray

from rlhf.actors import post_mortem
from rlhf.actors.calls import Call, Worker, failure_of, places, told
from rlhf.engines.weight_sync.base import Info
from rlhf.errors import WeightSyncError

Result = TypeVar("Result")


class RayEngineClient:
    """`EngineClient` over Ray actors; lives in the process of the policy's rank 0.

    One call is one remote call for each engine, and waits for all of them, so that the error names every engine that
    failed and not only the first.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = tuple(workers)

    @property
    def engine_names(self) -> tuple[str, ...]:
        return tuple(worker.name for worker in self._workers)

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        infos = dict(zip(self.engine_names, init_infos, strict=True))
        self._all(
            "join the weight-transfer group",
            lambda worker: worker.handle.init_weight_transfer.remote(infos[worker.name]),
            timeout_s,
        )

    def start_weight_update(self, timeout_s: float) -> None:
        self._all("start a weight update", lambda worker: worker.handle.start_weight_update.remote(), timeout_s)

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        self._all("receive weights", lambda worker: worker.handle.update_weights.remote(update_info), timeout_s)

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> dict[str, str]:
        digests = self._all(
            f"finish weight version {version}",
            lambda worker: worker.handle.finish_weight_update.remote(version, digest),
            timeout_s,
        )
        return dict(zip(self.engine_names, cast(list[str], digests), strict=True))

    def _all(self, phase: str, submit: "Callable[[Worker], ray.ObjectRef[object]]", timeout_s: float) -> list[object]:
        calls = [Call(worker=worker, ref=submit(worker)) for worker in self._workers]
        refs = [call.ref for call in calls]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        problems = [
            str(failure) for call in calls if call.ref not in late and (failure := failure_of(call, phase)) is not None
        ]
        if late:
            workers = [call.worker for call in calls if call.ref in late]
            silent = told(workers, post_mortem.look(places(workers)))
            problems.append(f"no answer within {timeout_s:g} s to {phase} from {silent}")
        if problems:
            raise WeightSyncError("; ".join(problems))
        results: list[object] = ray.get(refs)
        return results
