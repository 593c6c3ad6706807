"""The attempts of a run: each starts every worker, assembles the loop and runs it."""

import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rlhf.actors.calls import Call, Worker
from rlhf.actors.cluster import Cluster
from rlhf.actors.groups import WorkerGroup
from rlhf.actors.launch_spec import Workers
from rlhf.actors.launcher import Launcher
from rlhf.actors.ports import open_ports
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm, Needs
from rlhf.config.algo import AlgorithmSection
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.engines.base import Tokenizer, TokenScorer
from rlhf.engines.rewards import probe
from rlhf.errors import CheckpointError, MemoryExhaustedError
from rlhf.launch.data import RunData
from rlhf.launch.engines import role_engine
from rlhf.launch.gpu_budget import gpu_budget
from rlhf.launch.large_models import collective_timeout_s, loading_timeout_s, require_meant_device
from rlhf.launch.memory_forecast import memory_forecast
from rlhf.launch.offline import assemble_offline
from rlhf.launch.online import assemble_online
from rlhf.launch.rewards import remote_rewards, scoring_timeout_s
from rlhf.launch.run_folder import needed_room
from rlhf.launch.schedule import loop_sections
from rlhf.launch.specs import make_launch_spec
from rlhf.launch.stored_reference import fill_store, open_store, without_reference
from rlhf.orchestrator.loop import Loop, Parts
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.files import checkpoint_errors
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.resume import ResumePoint, remembered_token_limit, warn_of_threads
from rlhf.orchestrator.run.run_directory import TRIAL, RunProcess
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.planning.placement import Placement
from rlhf.planning.roles import place
from rlhf.repair import Repair, RepairKind
from rlhf.terminal import counted
from rlhf.types import Role


@dataclass(slots=True, kw_only=True)
class RunAttempts:
    """The attempts of one run. What an attempt starts is lost when a worker is lost, and started again by the next one;
    run directory, records and the connection to the cluster stay."""

    config: TrainConfig
    algorithm: AlgorithmSection
    """config.algo with the values that are computed from the data."""
    data: RunData
    tokenizer: Tokenizer
    length: RunLength
    cluster: Cluster
    records: Records
    checkpoints: Checkpoints
    stop: StopRequest
    fresh: RunState
    """The state of the run before its first step."""
    has_started: bool = False
    launcher: Launcher | None = None
    forecast: list[str] = field(default_factory=list)
    """What each process was expected to need, and warnings about it."""

    def run(self, resume_from: ResumePoint | None) -> None:
        """Start every worker, and train to the last step. If memory runs out, the error says what was planned."""
        try:
            self._run(resume_from)
        except MemoryExhaustedError as error:
            planned = f" Planned: {'; '.join(self.forecast)}." if self.forecast else ""
            raise MemoryExhaustedError(f"{error}{planned}", error.splittable_tokens) from error

    def use_less_memory(self, error: MemoryExhaustedError) -> str | None:
        """Halve the micro-batches of the next attempt, if train.on_oom says so and they can be split. The gradient is
        the same: its denominators are those of the whole optimizer step."""
        train = self.config.train
        limit = min(train.max_tokens_per_micro_batch, error.splittable_tokens) // 2
        if train.on_oom == "stop" or not limit:
            return None
        self.limit_tokens(limit)
        return f"micro-batches have at most {limit} tokens (train.max_tokens_per_micro_batch)"

    def keep_token_limit(self, resume_from: ResumePoint | None) -> None:
        """Keep the limit of tokens that an earlier launch of this run reached when memory ran out."""
        if resume_from is not None and (limit := remembered_token_limit(resume_from.state, self.fresh)):
            self.records.say(f"micro-batches have at most {limit} tokens: memory ran out in this run with larger ones")
            self.limit_tokens(limit)

    def limit_tokens(self, limit: int) -> None:
        """Give micro-batches at most `limit` tokens from the next attempt on; checkpoints remember it."""
        train = self.config.train.model_copy(update={"max_tokens_per_micro_batch": limit})
        self.config = self.config.model_copy(update={"train": train})
        self.fresh = replace(self.fresh, token_limit=limit)

    def _run(self, resume_from: ResumePoint | None) -> None:
        config, cluster, records = self.config, self.cluster, self.records
        algorithm = build_algorithm(self.algorithm)
        store = open_store(
            config, self.data.groups, self.tokenizer, self.length.num_steps, cluster.device, records, resume_from
        )
        needs = without_reference(algorithm.needs) if store is not None and store.is_complete else algorithm.needs
        placement = place(config, needs)
        if not self.has_started:
            require_meant_device(config, needs, cluster.device)
            self.forecast = memory_forecast(config, needs, cluster)
            for line in self.forecast:
                records.say(line)
        workers = self._start(needs, placement)
        self._show_workers(placement)
        self._record_threads(resume_from)
        if not self.has_started:
            self._check_export(workers, algorithm.needs.exported_role)
        self.has_started = True
        if store is not None and not store.is_complete:
            workers = fill_store(store, config.train, cluster, workers, records, self.stop)
        gpus = gpu_budget(
            config, needs, placement, cluster.gpu_kinds if cluster.device == "cuda" else [], self.length.num_epochs
        )
        loop = Loop(
            replace(self._assemble(algorithm, workers, placement, store), gpus=gpus),
            loop_sections(config),
            self.length,
            records=records,
            checkpoints=self.checkpoints,
            stop=self.stop,
            fresh=self.fresh,
        )
        loop.run(resume_from)

    def clear(self) -> list[str]:
        """End the workers of the last attempt, except those that the next one can use. Returns the names of these."""
        is_online = self.config.is_online  # an offline run may need fewer models by now
        surviving = self.launcher.find_surviving() if self.launcher is not None and is_online else []
        self.cluster.clear(surviving)
        return [worker.name for worker in surviving]

    def _start(self, needs: Needs, placement: Placement) -> Workers:
        """Start and load every worker, and connect policy and rollout engines."""
        config = self.config
        if self.launcher is None or not config.is_online:
            updates = {role: self.length.num_updates(role) for role in needs.trains}
            self.launcher = Launcher(
                self.cluster,
                placement,
                make_launch_spec(config, needs, placement, updates, self.cluster.device),
                start_timeout_s=loading_timeout_s(config, needs),
                collective_timeout_s=collective_timeout_s(config, needs),
                on_replaced=self._note_replaced if config.cluster.max_restarts else None,
            )
        workers = self.launcher.launch(partial(self._probe_rewards, needs), self._require_folder)
        for note in workers.notes:
            if isinstance(note, Repair):
                self.records.repair(note)
            elif not self.has_started:
                self.records.warn(note)
        return workers

    def _require_folder(self, savers: Sequence[Worker]) -> None:
        """Check that every node that will write checkpoints can write to the run's folder, before models are loaded.

        Raises:
            CheckpointError: one cannot; names the worker and its node.
        """
        folder, room = self.records.directory.path, needed_room(self.config, os.environ)
        with checkpoint_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as marker:
            name = Path(marker.name).name
            calls = [Call(worker=one, ref=one.handle.folder_problem.remote(folder, name, room)) for one in savers]
            problems = self.cluster.calls.wait_all(
                calls, phase="look at run.dir", timeout_s=self.config.cluster.start_timeout_s
            )
        found = [f"{worker}: {problem}" for worker, problem in zip(savers, problems, strict=True) if problem]
        if found:
            raise CheckpointError(f"run.dir: {folder}: {'; '.join(found)}")

    def _probe_rewards(self, needs: Needs, sources: Mapping[str, WorkerGroup]) -> None:
        """Score made-up responses by every reward source that has workers of its own."""
        config, prompts = self.config, self.data.prompts
        if not isinstance(config, OnlineConfig) or prompts is None:
            return
        timeout_s = scoring_timeout_s(config.reward, config.train.step_timeout_s)
        num_responses = config.rollout.group_size + needs.greedy_baseline
        for source in remote_rewards(sources, timeout_s, self.records.repair).values():
            probe(source, prompts.train[0], self.tokenizer, group_size=num_responses)

    def _show_workers(self, placement: Placement) -> None:
        """Say which workers run where, and what they listen on."""
        cluster = self.cluster
        groups = counted(len(placement.groups), "group")
        lines = [f"{counted(placement.num_devices, 'device')} ({cluster.device}) in {groups}"]
        lines += [f"  {worker}" for worker in cluster.workers]
        for line in (*lines, *open_ports(cluster.workers, cluster.calls, self.config.cluster.start_timeout_s)):
            self.records.say(line)
        self._write_processes()

    def _check_export(self, workers: Workers, role: Role) -> None:
        """Export the untrained model once: a run whose model cannot be saved must not train first."""
        engine = role_engine(workers, role, self.config.train.step_timeout_s)
        with tempfile.TemporaryDirectory(dir=self.records.directory.path, prefix=TRIAL) as trial:
            engine.verify_export(Path(trial))

    def _assemble(
        self, algorithm: Algorithm, workers: Workers, placement: Placement, reference: TokenScorer | None
    ) -> Parts:
        """The parts of the loop."""
        config, data = self.config, self.data
        if isinstance(config, OnlineConfig):
            return assemble_online(
                config, algorithm, data, workers, placement, self.tokenizer, self.stop, self.records.repair
            )
        assert data.groups is not None
        return assemble_offline(config, self.algorithm, algorithm, data.groups, workers, reference)

    def _note_replaced(self, text: str) -> None:
        """Note that lost workers were replaced."""
        self.records.repair(Repair(kind=RepairKind.WORKER, where=text, text=text))
        self._write_processes()

    def _record_threads(self, resume_from: ResumePoint | None) -> None:
        """Put the number of threads into the checkpoints, and say where it is another one than before."""
        assert self.launcher is not None
        self.fresh = replace(self.fresh, threads=self.launcher.threads)
        if resume_from is not None and (line := warn_of_threads(resume_from.state, self.fresh)):
            self.records.warn(line)

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
