"""The trainer's client for the weight-sync calls of all rollout engines, over Ray."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from rlhf.actors import post_mortem
from rlhf.actors.calls import Call, Worker
from rlhf.actors.waiting import describe_late, processes_by_node, results_of, wait
from rlhf.engines.weight_sync.base import Info
from rlhf.errors import WeightSyncError

if TYPE_CHECKING:
    import ray


class RayEngineClient:
    """An `EngineClient` in the process of the policy's rank 0.

    Each method calls every engine and waits for all of them, so that the error names every engine that failed.
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
        outcome = wait(calls, phase=phase, timeout_s=timeout_s, stop_at_failure=False)
        problems = [str(failure) for failure in outcome.failures]
        if outcome.pending:
            late = [call.worker for call in outcome.pending]
            described = describe_late(late, post_mortem.examine(processes_by_node(late)))
            problems.append(f"no reply within {timeout_s:g} s to {phase} from {described}")
        if problems:
            raise WeightSyncError("; ".join(problems))
        return results_of(calls, phase)
