"""The workers: Ray actors around engines. A remote method is one call of an engine.

The driver imports this module and must stay light, so each worker imports its engine when it loads it.
"""

# ruff: noqa: PLC0415

import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from rlhf.actors import environment
from rlhf.actors.actor import Actor, node_address
from rlhf.actors.calls import Worker
from rlhf.actors.engine_client import RayEngineClient
from rlhf.actors.ranks import RankActor
from rlhf.config.reward import RemoteSource
from rlhf.config.rollout import ENGINES
from rlhf.engines.base import RewardSource, TokenScorer
from rlhf.engines.process.hub_retries import telling_hub_retries
from rlhf.engines.process.memory_errors import naming_memory_errors
from rlhf.engines.process.repairs import RepairLog
from rlhf.engines.rollout.open_engine import ServingEngine, engine_kind, open_engine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.engines.weight_sync.base import Info
from rlhf.engines.weight_sync.probe import PolicyProbe
from rlhf.errors import RlhfError
from rlhf.importing import importing
from rlhf.repair import Repair
from rlhf.types import (
    FloatArray,
    Metrics,
    PackedTokens,
    Prompt,
    Reward,
    Role,
    Rollout,
    RolloutRequest,
    StepReport,
    SyncReport,
    TrainBatch,
)

if TYPE_CHECKING:
    from rlhf.engines.training.engine import DeepSpeedEngine
    from rlhf.engines.weight_sync.source import WeightSource


class ModelWorker(RankActor):
    """One rank of a device group, with an engine for every role that the group has."""

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._trained: dict[Role, DeepSpeedEngine] = {}
        self._engines: dict[Role, TokenScorer] = {}
        self._repairs = RepairLog()

    def load_scorer(self, role: Role, spec: ScorerSpec) -> tuple[str | Repair, ...]:
        """Load a model that is not trained. Returns what the user should know about how it computes, and what was
        repaired on the way."""
        with importing():
            from rlhf.engines.training.scoring import ScoringEngine

        with naming_memory_errors(role, "load"), telling_hub_retries(self._repairs.add):
            engine = ScoringEngine(spec, device=self._rank.device, where=f"{role}.model")
        self._engines[role] = engine
        return (*engine.self_test.notes, *self._repairs.take())

    def folder_problem(self, folder: Path, marker: str, room: int) -> str:
        """As `shared_folder.folder_problem`, from this worker's node."""
        from rlhf.engines.process.shared_folder import folder_problem

        return folder_problem(folder, marker, room)

    def unload(self, role: Role) -> None:
        """Drop a model that is not trained, and free its memory."""
        from rlhf.engines.process.device_memory import free_memory

        del self._engines[role]
        free_memory()

    def release_memory(self) -> None:
        """Release unused GPU memory for the engine on the same GPU."""
        from rlhf.engines.process.device_memory import empty_cache

        empty_cache()

    def load_trained_model(self, role: Role, spec: TrainedModelSpec) -> tuple[str | Repair, ...]:
        """Load a model that is trained, with the losses of the algorithm that its config describes. Returns what the
        user should know about how it computes, and what was repaired on the way."""
        with importing():
            from rlhf.algorithms import build_algorithm
            from rlhf.engines.training.engine import DeepSpeedEngine

        algorithm = build_algorithm(spec.algorithm)
        with naming_memory_errors(role, "load"), telling_hub_retries(self._repairs.add):
            engine = DeepSpeedEngine(spec, algorithm.objectives(), device=self._rank.device, where=f"{role}.model")
            if role is Role.POLICY and algorithm.needs.ema_reference is not None:
                engine.start_ema_reference(algorithm.needs.ema_reference.decay)
        self._engines[role] = self._trained[role] = engine
        return (*engine.self_test.notes, *self._repairs.take())

    def connect_rollout(self, role: Role, spec: EngineSpec, engines: Sequence[Worker]) -> None:
        """Connect to rollout engines: `send_weights` sends to these from now on. Called on every rank."""
        from rlhf.engines.weight_sync.adapter_source import AdapterSource
        from rlhf.engines.weight_sync.senders import make_sender
        from rlhf.engines.weight_sync.sources import make_source

        trained = self._trained[role]
        if spec.adapter_rank:
            source: WeightSource = AdapterSource(trained.module, spec.dtype)
        else:
            stored_names = ENGINES[engine_kind(spec.section)].stored_names
            source = make_source(trained.module, spec.dtype, stored_names=stored_names)
        address = node_address()
        trained.detach_sender()
        trained.attach_sender(
            make_sender(
                spec.sync_backend,
                source,
                RayEngineClient(engines),
                rank=self._rank.rank,
                world_size=self._rank.world_size,
                master_address=address,
                port=0,
                num_receivers=len(engines) * spec.section.tensor_parallel_size,
                bucket_bytes=int(spec.section.sync_bucket_mib * 2**20),
                timeout_s=spec.section.sync_timeout_s,
            )
        )

    def forward(self, role: Role, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        with self._trace.span(f"{role} forward"), naming_memory_errors(role, "forward", batches):
            return self._engines[role].forward(batches)

    def forward_ema_reference(self, role: Role, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        with self._trace.span(f"{role} forward_ema_reference"), naming_memory_errors(role, "forward", batches):
            return self._trained[role].forward_ema_reference(batches)

    def update_ema(self, role: Role) -> float:
        with self._trace.span(f"{role} update_ema"):
            return self._trained[role].update_ema()

    def forward_backward(self, role: Role, batches: Sequence[TrainBatch]) -> Metrics:
        tokens = [batch.tokens for batch in batches]
        with self._trace.span(f"{role} forward_backward"), naming_memory_errors(role, "forward_backward", tokens):
            return self._trained[role].forward_backward(batches)

    def optim_step(self, role: Role) -> StepReport:
        with self._trace.span(f"{role} optim_step"), naming_memory_errors(role, "optim_step"):
            return self._trained[role].optim_step()

    def send_weights(self, role: Role, version: int) -> SyncReport:
        with self._trace.span(f"{role} send_weights"), naming_memory_errors(role, "send_weights"):
            return self._trained[role].send_weights(version)

    def probe(self, role: Role, packed: PackedTokens) -> PolicyProbe:
        """The model's log-probs of what an engine sampled, in two ways."""
        return self._trained[role].probe(packed)

    def save(self, role: Role, directory: Path) -> None:
        with self._trace.span(f"{role} save"), naming_memory_errors(role, "save"):
            self._trained[role].save(directory)

    def load(self, role: Role, directory: Path) -> None:
        self._trained[role].load(directory)

    def export(self, role: Role, directory: Path) -> None:
        with naming_memory_errors(role, "save"):
            self._trained[role].export(directory)

    def check_export(self, role: Role, directory: Path) -> None:
        self._trained[role].check_export(directory)


class CollectivesWorker(RankActor):
    """A rank that runs the collectives of a weight sync alone, to measure them."""

    def measure(self, num_bytes: int, num_buckets: int, num_trainers: int, repeats: int) -> list[tuple[float, float]]:
        from rlhf.engines.process.distributed import torch_device
        from rlhf.engines.weight_sync.collectives import time_collectives

        return time_collectives(num_bytes, num_buckets, num_trainers, repeats, torch_device(self._rank.device))


class RolloutWorker(Actor):
    """One rollout engine. Its methods run in threads, so that it can be called while it generates.

    A pool of the driver submits requests, and one call of `collect` at a time waits for what is complete. So there is
    neither a thread nor a remote call for each response.
    """

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._engine: ServingEngine | None = None
        self._ended: dict[str, SimpleQueue[Future[Rollout] | None]] = {}
        """The futures that have ended, by the pool that submitted them; None ends a call of `collect`."""

    def start(self, spec: EngineSpec, name: str, gpus: Sequence[str]) -> None:
        """Load the model on `gpus`; if empty, on the GPUs that Ray assigned to this process."""
        from rlhf.engines.process.rendezvous import bind_collectives

        if spec.device == "cuda":
            self.see_gpus(gpus or self.gpus())
            environment.drop_expandable_segments(os.environ)
        bind_collectives(node_address())
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


class RewardWorker(Actor):
    """A reward source in a process of its own: a function, service, judge or verifier."""

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._sources: list[RewardSource] = []
        self._free: SimpleQueue[RewardSource] = SimpleQueue()
        self._repairs = RepairLog()

    def start(self, source: RemoteSource, concurrency: int) -> None:
        """Open the source, once for each call that may run at the same time. The module of a function may be in the
        driver's working directory."""
        from rlhf.engines.rewards import build_source

        for _ in range(concurrency):
            self._sources.append(build_source(source, self._repairs.add))
            self._free.put(self._sources[-1])

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]
    ) -> tuple[list[Reward], list[Repair]]:
        """The rewards, and what the source repaired since the last call."""
        source = self._free.get()
        try:
            with self._trace.span("score"):
                return source.score(prompts, responses, rollouts), self._repairs.take()
        finally:
            self._free.put(source)

    def close(self) -> None:
        for source in self._sources:
            source.close()
