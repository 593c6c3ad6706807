"""The workers of rollout engines: Ray actors around an engine. A remote method is one call of it."""

# ruff: noqa: PLC0415

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from rlhf.actors.calls import Worker
from rlhf.actors.engine_parts import EngineActor, PartWatch
from rlhf.engines.process.memory_errors import naming_memory_errors
from rlhf.engines.rollout.open_engine import ServingEngine, open_engine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.base import Info
from rlhf.errors import RlhfError
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest

STORE_TIMEOUT_S = 60.0


class RolloutWorker(EngineActor):
    """One rollout engine. Its methods run in threads, so that it can be called while it generates.

    A pool of the driver submits requests, and one call of `collect` at a time waits for what is complete. So there is
    neither a thread nor a remote call for each response.
    """

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._engine: ServingEngine | None = None
        self._store: object = None
        """Where the processes of an engine over nodes meet, kept while it lives."""
        self._watch: PartWatch | None = None
        self._ended: dict[str, SimpleQueue[Future[Rollout] | None]] = {}
        """The futures that have ended, by the pool that submitted them; None ends a call of `collect`."""

    def start(self, spec: EngineSpec, name: str, gpus: Sequence[str], parts: Sequence[Worker] = ()) -> None:
        """Load the model on `gpus`; if empty, on the GPUs that Ray assigned to this process. Where the engine is spread
        over nodes, `parts` are the workers on the others, which load theirs at the same time: this waits for them."""
        from rlhf.engines.process.rendezvous import serve_store

        self._prepare(spec, gpus)
        if self._listener is not None:
            self._store = serve_store(self._listener, STORE_TIMEOUT_S)
            self._watch = PartWatch(name, parts)
        with naming_memory_errors(name, "engine"):
            self._engine = open_engine(spec, name=name)

    def reset(self) -> None:
        self.engine.reset()
        ended, self._ended = self._ended, {}
        for queue in ended.values():
            queue.put(None)

    def peak_memory(self) -> int:
        return self.engine.peak_memory()

    @property
    def engine(self) -> ServingEngine:
        if self._engine is None:
            raise RlhfError("the rollout engine was called before it was started")
        return self._engine

    def submit(self, pool: str, requests: Sequence[RolloutRequest]) -> None:
        """Ask the engine for responses, which `collect` gives to the same pool."""
        ended = self._ended.setdefault(pool, SimpleQueue())
        with naming_memory_errors("rollout", "engine"):
            for future in self.engine.submit(requests):
                future.add_done_callback(ended.put)

    def collect(self, pool: str) -> list[Rollout]:
        """Wait until a response to a request of the pool is complete, or aborted; returns those that are complete."""
        queue = self._ended.setdefault(pool, SimpleQueue())
        with self._trace.span("generate"), naming_memory_errors("rollout", "engine"):
            ended = [queue.get()]
            while not queue.empty():
                ended.append(queue.get())
            return [future.result() for future in ended if future is not None and not future.cancelled()]

    def abort(self, request_ids: Sequence[str]) -> None:
        self.engine.abort(request_ids)

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        return self.engine.score(sequences)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake_weights(self) -> None:
        with naming_memory_errors("rollout", "engine"):
            self.engine.wake_weights()

    def wake(self) -> None:
        with naming_memory_errors("rollout", "engine"):
            self.engine.wake()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self.engine.close()

    def init_weight_transfer(self, init_info: Info) -> None:
        self.engine.init_weight_transfer(init_info)

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, update_info: Info) -> None:
        with naming_memory_errors("rollout", "engine"):
            self.engine.update_weights(update_info)

    def finish_weight_update(self, version: int, digest: str) -> str:
        return self.engine.finish_weight_update(version, digest)
