"""The composition root of one start of a run: the one place that knows every class, and joins them."""

import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf.actors.calls import traffic
from rlhf.actors.cluster import Cluster
from rlhf.actors.groups import WorkerGroup
from rlhf.actors.launcher import Launcher, Workers
from rlhf.actors.ports import open_ports
from rlhf.actors.stragglers import Stragglers
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Needs
from rlhf.config.algo import AlgorithmSection
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.engines.base import Tokenizer
from rlhf.launch.assembly import (
    Data,
    assemble_offline,
    assemble_online,
    course,
    first_role,
    remote_rewards,
    trainee,
    try_reward,
)
from rlhf.launch.memory_forecast import memory_forecast
from rlhf.launch.specs import make_launch_spec
from rlhf.launch.stored_reference import fill_store, open_store, without_reference
from rlhf.orchestrator.loop import Loop
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.orchestrator.run.run_directory import RunProcess
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.planning.placement import Placement
from rlhf.planning.roles import place


@dataclass(slots=True, kw_only=True)
class Training:
    """A run's attempts: everything between its open folder and its trained model that a lost worker takes along."""

    command: str
    config: TrainConfig
    data: Data
    tokenizer: Tokenizer
    length: RunLength
    cluster: Cluster
    records: Records
    checkpoints: Checkpoints
    stop: StopRequest
    fresh: RunState
    algorithm: AlgorithmSection
    """What to learn: config.algo with what follows from the data."""
    has_started: bool = False
    launcher: Launcher | None = None

    def run(self, resume_from: ResumePoint | None) -> None:
        """Start every process, and train to the end."""
        config, cluster, records = self.config, self.cluster, self.records
        algorithm = build_algorithm(self.algorithm)
        store = open_store(config, self.data.groups, self.tokenizer, self.length.num_steps, cluster.device, records)
        needs = without_reference(algorithm.needs) if store is not None and store.is_complete else algorithm.needs
        placement = place(config, needs)
        if not self.has_started:
            for line in memory_forecast(self.command, config, needs, cluster):
                records.say(line)
        traffic.clock = Stragglers(records.warn).see
        workers = self._start(needs, placement)
        ports = open_ports(cluster.workers, config.cluster.start_timeout_s)
        for line in (*describe(cluster, placement), *ports):
            records.say(line)
        self._write_processes()
        with tempfile.TemporaryDirectory(dir=records.directory.path, prefix="trial-") as trial:
            trainee(config, workers, first_role(algorithm)).prove_export(Path(trial))
        self.has_started = True
        if store is not None and not store.is_complete:
            workers = fill_store(store, config, cluster, workers, records, self.stop)
        if isinstance(config, OnlineConfig):
            parts = assemble_online(config, algorithm, self.data, workers, placement, self.tokenizer, self.stop)
        else:
            assert self.data.groups is not None
            parts = assemble_offline(self.command, config, self.algorithm, algorithm, self.data.groups, workers, store)
        loop = Loop(
            parts,
            course(config, self.length),
            records=records,
            checkpoints=self.checkpoints,
            stop=self.stop,
            fresh=self.fresh,
        )
        loop.run(resume_from)

    def clear(self) -> list[str]:
        """End the processes of the last attempt, but for those that lost nothing. Returns the names of these."""
        is_online = isinstance(self.config, OnlineConfig)  # a run on given answers may need fewer models by now
        spared = self.launcher.spare() if self.launcher is not None and is_online else []
        self.cluster.clear(spared)
        return [worker.name for worker in spared]

    def _start(self, needs: Needs, placement: Placement) -> Workers:
        """Start every actor, and bring the policy and the engines together."""
        config = self.config
        if self.launcher is None or not isinstance(config, OnlineConfig):
            updates = {role: self.length.num_updates(role) for role in needs.trains}
            self.launcher = Launcher(
                self.cluster,
                placement,
                make_launch_spec(config, needs, placement, updates, self.cluster.device),
                start_timeout_s=config.cluster.start_timeout_s,
                collective_timeout_s=config.train.step_timeout_s,
                replaced=self._replaced if config.cluster.max_restarts else None,
            )
        return self.launcher.launch(partial(self._try_rewards, needs))

    def _try_rewards(self, needs: Needs, sources: Mapping[str, WorkerGroup]) -> None:
        """Score made answers by every source that lives in a process of its own."""
        config, prompts = self.config, self.data.prompts
        if isinstance(config, OnlineConfig) and prompts is not None:
            for source in remote_rewards(config, sources).values():
                try_reward(source, config, needs, prompts.train[0], self.tokenizer)

    def _replaced(self, text: str) -> None:
        """Lost processes that held nothing of the run have others in their places."""
        self.records.note("replacement", text)
        self._write_processes()

    def _write_processes(self) -> None:
        self.records.directory.write_processes(
            [
                RunProcess(
                    name=worker.name,
                    host=socket.gethostname() if worker.node_id == self.cluster.node_id else worker.node,
                    node_id=worker.node_id,
                    device=self.cluster.device,
                    pid=worker.pid,
                    stacks=worker.stacks.name if worker.stacks else "",
                )
                for worker in self.cluster.workers
            ]
        )


def describe(cluster: Cluster, placement: Placement) -> list[str]:
    """Who runs where."""
    lines = [f"{placement.num_devices} devices ({cluster.device}) in {len(placement.groups)} groups"]
    return [*lines, *(f"  {worker}" for worker in cluster.workers)]
