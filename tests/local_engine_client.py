"""A client for receivers in the trainer's own process."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from rlhf.engines.weight_sync.base import Info, WeightReceiver
from rlhf.errors import WeightSyncError

T = TypeVar("T")


class LocalEngineClient:
    """Calls each receiver in a thread of its own; satisfies `EngineClient`."""

    def __init__(self, receivers: Mapping[str, WeightReceiver]) -> None:
        self._receivers = dict(receivers)
        self._threads = ThreadPoolExecutor(1 + 2 * len(receivers), thread_name_prefix="engine-client")

    @property
    def engine_names(self) -> tuple[str, ...]:
        return tuple(self._receivers)

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        infos = dict(zip(self._receivers, init_infos, strict=True))
        self._call(lambda name: self._receivers[name].init_weight_transfer(infos[name]), "init", timeout_s)

    def start_weight_update(self, timeout_s: float) -> None:
        self._call(lambda name: self._receivers[name].start_weight_update(), "start", timeout_s)

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        self._call(lambda name: self._receivers[name].update_weights(update_info), "update", timeout_s)

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> dict[str, str]:
        return self._call(lambda name: self._receivers[name].finish_weight_update(version, digest), "finish", timeout_s)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _call(self, call: Callable[[str], T], phase: str, timeout_s: float) -> dict[str, T]:
        futures: dict[str, Future[T]] = {name: self._threads.submit(call, name) for name in self._receivers}
        wait(futures.values(), timeout=timeout_s)
        problems = []
        for name, future in futures.items():
            if not future.done():
                problems.append(f"engine {name}: no answer to {phase} of a weight sync in {timeout_s:g} s")
            elif (error := future.exception()) is not None:
                problems.append(str(error) if isinstance(error, WeightSyncError) else f"engine {name}: {error!r}")
        if problems:
            raise WeightSyncError("\n".join(problems))
        return {name: future.result() for name, future in futures.items()}
