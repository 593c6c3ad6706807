"""The workers: Ray actors around engines. A remote method is one call of an engine.

The driver imports this module and must stay light, so each worker imports its engine when it loads it.
"""

# ruff: noqa: PLC0415

from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from rlhf.actors.actor import Actor, node_address
from rlhf.actors.calls import Worker
from rlhf.actors.engine_client import RayEngineClient
from rlhf.actors.ranks import RankActor
from rlhf.config.reward import RemoteSource
from rlhf.config.rollout import ENGINES
from rlhf.engines.base import PassReport, RewardSource, TokenScorer
from rlhf.engines.process.hub_retries import telling_hub_retries
from rlhf.engines.process.memory_errors import naming_memory_errors
from rlhf.engines.process.repairs import RepairLog
from rlhf.engines.rollout.open_engine import engine_kind
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.engines.weight_sync.probe import PolicyProbe
from rlhf.importing import importing
from rlhf.repair import Repair
from rlhf.types import (
    FloatArray,
    PackedTokens,
    Prompt,
    Reward,
    Role,
    Rollout,
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
                num_receivers=len(engines) * spec.section.devices_per_engine,
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

    def forward_backward(self, role: Role, batches: Sequence[TrainBatch]) -> PassReport:
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
