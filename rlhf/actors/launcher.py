"""Starts the workers of a run: reserve bundles, start processes, set up process groups, load models."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

from ray.exceptions import RayError

from rlhf.actors import environment
from rlhf.actors.calls import Call, Worker
from rlhf.actors.cluster import Cluster, WorkerSlot
from rlhf.actors.engine_group import EngineGroup
from rlhf.actors.engine_parts import RolloutPart
from rlhf.actors.environment_workers import WorkerSessions, open_workers
from rlhf.actors.groups import ReplaceableGroup, WorkerGroup
from rlhf.actors.launch_spec import LaunchSpec, SurvivingWorkers, Workers, colocated_models, model_roles
from rlhf.actors.ranks import join_ranks
from rlhf.actors.rollout_workers import RolloutWorker
from rlhf.actors.waiting import RemoteCalls
from rlhf.actors.workers import ModelWorker, RewardWorker
from rlhf.engines.rollout.spec import EnginePart
from rlhf.errors import RlhfError
from rlhf.planning.placement import DeviceGroup, Placement
from rlhf.types import Role

ENGINE_THREADS = 8
"""Concurrent calls of a rollout engine: one generates, others check it, sync weights and close it."""
LIST_GPUS_TIMEOUT_S = 60.0
NOWHERE = ("127.0.0.1", 0)
"""Where the processes of an engine meet that is not spread over nodes."""
HEALTH_TIMEOUT_S = 10.0
Key = TypeVar("Key")


def gpus_of_parts(group: DeviceGroup, ranks: Sequence[Worker], calls: RemoteCalls) -> list[Sequence[str]]:
    """The GPUs that each part of each engine of a device group shares with the group's ranks. Raises: as
    `RemoteCalls.run`."""
    asked = [Call(worker=rank, ref=rank.handle.gpus.remote()) for rank in ranks]
    gpus = cast(list[list[str]], calls.wait_all(asked, phase="listing of GPUs", timeout_s=LIST_GPUS_TIMEOUT_S))
    return [[gpus[rank][0] for rank in part] for part in group.engine_parts]


class Launcher:
    """Starts the workers of one launch spec in a placement, and replaces workers that are lost.

    Every wait ends after `start_timeout_s` with an error that names the late workers. Probing the reward sources has
    the deadlines of these sources.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        launch_spec: LaunchSpec,
        *,
        start_timeout_s: float,
        collective_timeout_s: float,
        on_replaced: Callable[[str], None] | None,
    ) -> None:
        """Lost workers without state of the run are replaced, and `on_replaced` gets a message. With None, the loss of
        any worker is an error."""
        self._cluster = cluster
        self._placement = placement
        self._spec = launch_spec
        self._start_timeout_s = start_timeout_s
        self._join = partial(
            join_ranks,
            calls=cluster.calls,
            device=cluster.device,
            start_timeout_s=start_timeout_s,
            collective_timeout_s=collective_timeout_s,
        )
        self._on_replaced = on_replaced
        num_cores = max(cluster.cpus_per_node, default=1.0)
        self._env = environment.model_environment(placement, cluster.device, num_cores, os.environ)
        self._rank_env = self._env | environment.rank_environment(placement, cluster.device, num_cores, os.environ)
        self._slots: Mapping[Role, list[WorkerSlot]] = {}
        self._gpus_of_parts: list[Sequence[str]] = []
        self._surviving = SurvivingWorkers()
        self._workers: Workers | None = None

    @property
    def threads(self) -> str:
        """OMP_NUM_THREADS of every process that holds a model on CPUs; empty on GPUs."""
        return self._env.get("OMP_NUM_THREADS", "")

    def find_surviving(self) -> list[Worker]:
        """Choose the workers of the last launch that the next one can use again; empty if a node is gone.

        Trained models and everything on their devices start again, and so does a group unless all of its workers are
        healthy. Rollout engines that receive weights through NCCL or CUDA IPC start again as well: their communicator
        has lost a peer.
        """
        workers, self._workers, self._surviving = self._workers, None, SurvivingWorkers()
        if workers is not None and workers.engines is not None:
            workers.engines.close()
        if workers is None or not self._cluster.is_complete:
            return []
        separate = [group for group in self._placement.groups if not group.is_shared_by_engines]
        models = {
            roles: workers.groups[roles[0]]
            for roles in model_roles(separate)
            if not any(role in self._spec.trained for role in roles)
        }
        can_rejoin = self._spec.engine is not None and self._spec.engine.sync_backend == "gloo"
        has_own_devices = any(Role.ROLLOUT in group.roles for group in separate)
        engines = workers.engines if can_rejoin and has_own_devices else None
        if engines is not None and len(engines.workers) < self._placement.group_of(Role.ROLLOUT).num_engines:
            engines = None
        self._surviving = SurvivingWorkers(
            models={roles: group for roles, group in models.items() if self._is_healthy(group)},
            engines=engines.workers if engines is not None and self._is_healthy(engines) else (),
            rewards={name: group for name, group in workers.rewards.items() if self._is_healthy(group)},
        )
        return self._surviving.workers

    def launch(
        self,
        probe_rewards: Callable[[Mapping[str, WorkerGroup]], None],
        check_savers: Callable[[Sequence[Worker]], None] = lambda _: None,
    ) -> Workers:
        """Reserve bundles, start workers, set up process groups, load models. `probe_rewards` gets the new reward
        workers while the models load, so that an error of a reward source is known early; `check_savers` gets the
        workers that will write checkpoints, before anything loads."""
        spec, surviving = self._spec, self._surviving
        if not surviving.workers:
            self._slots = self._cluster.reserve(self._placement)
        missing = [roles for roles in model_roles(self._placement.groups) if roles not in surviving.models]
        sources = [name for name in spec.rewards if name not in surviving.rewards]
        has_new_engines = spec.engine is not None and not surviving.engines
        places = range(self._placement.group_of(Role.ROLLOUT).num_engines) if has_new_engines else ()
        # All are started before the first is waited for.
        starting_models = {roles: self._start_ranks(roles) for roles in missing}
        starting_engines = [call for place in places for call in self._start_engine(place)]
        starting_rewards = {name: self._start_reward(name) for name in sources}
        models = self._wait_started(starting_models)
        engines = self._wait_engines(starting_engines) if has_new_engines else surviving.engines
        rewards = self._wait_started(starting_rewards)
        is_saver = {roles: any(role in spec.trained for role in roles) for roles in models}
        check_savers([worker for roles, ranks in models.items() if is_saver[roles] for worker in ranks])
        self._gpus_of_parts = self._shared_gpus(models)
        # Engines import their libraries while ranks import theirs, which they do before they join.
        calls = self._load_engines(engines, places) if has_new_engines and not self._shares_gpus else []
        self._join(list(models.values()))
        calls += [call for roles, workers in models.items() for call in self._load_models(roles, workers)]
        self._load([call for name, workers in rewards.items() for call in self._load_reward(name, workers)])
        probe_rewards({name: WorkerGroup(workers, self._cluster.calls) for name, workers in rewards.items()})
        loaded = self._load(calls)
        groups = {role: group for roles, group in surviving.models.items() for role in roles}
        groups |= {role: group for roles, ranks in models.items() for role, group in self._group(roles, ranks).items()}
        if has_new_engines and self._shares_gpus:
            # After the models: vLLM counts all GPU memory that is allocated while it starts as its own.
            self._release_memory(groups)
            self._load(self._load_engines(engines, places))
        if spec.engine is not None:
            self._connect(groups[Role.POLICY], engines)
        self._workers = Workers(
            device=self._cluster.device,
            groups=groups,
            sequence_parallel=spec.sequence_parallel,
            engines=self._engine_group(groups, engines) if spec.engine is not None else None,
            rewards=dict(surviving.rewards)
            | {name: self._reward_group(name, workers) for name, workers in rewards.items()},
            environments=self._open_environments(),
            # Of each role once: all ranks say the same.
            notes=tuple(dict.fromkeys(note for notes in loaded if isinstance(notes, tuple) for note in notes)),
        )
        return self._workers

    @staticmethod
    def _is_healthy(group: WorkerGroup) -> bool:
        """Whether every worker replies soon to a request that also ends what it was doing."""
        try:
            # Not by the group itself, which would replace its lost workers.
            group.subset(group.workers).run(
                lambda _rank, handle: handle.reset.remote(), phase="health check", timeout_s=HEALTH_TIMEOUT_S
            )
        except (RlhfError, RayError):
            return False
        return True

    def _start_ranks(self, roles: tuple[Role, ...]) -> list[Call]:
        """Start the ranks that hold the models of `roles`."""
        title = "".join(role.capitalize() for role in roles)
        return [
            self._cluster.start_worker(
                ModelWorker, slot, name=f"{'+'.join(roles)} rank {rank}", title=title, env=self._rank_env
            )
            for rank, slot in enumerate(self._slots[roles[0]])
        ]

    def _start_engine(self, place: int) -> list[Call]:
        """Start the worker of an engine, and those of its parts on other nodes."""
        nodes = self._placement.group_of(Role.ROLLOUT).nodes_per_engine
        return [
            self._cluster.start_worker(
                RolloutPart if part else RolloutWorker,
                self._slots[Role.ROLLOUT][place * nodes + part],
                name=f"rollout engine {place} part {part}" if part else f"rollout engine {place}",
                title="Rollout",
                env=self._env,
                max_concurrency=ENGINE_THREADS,
            )
            for part in range(nodes)
        ]

    def _start_reward(self, name: str) -> list[Call]:
        concurrency = self._spec.reward_concurrency
        return [
            self._cluster.start_worker(
                RewardWorker,
                None,
                name=f"reward {name}",
                title="Reward",
                env=self._env,
                max_concurrency=concurrency,
            )
        ]

    def _open_environments(self) -> WorkerSessions | None:
        """The workers of tools and environments, if there are some."""
        if self._spec.environments is None:
            return None
        return open_workers(
            self._cluster,
            self._spec.environments,
            timeout_s=self._start_timeout_s,
            on_replaced=self._on_replaced,
            env=self._env,
        )

    def _wait_started(self, calls: Mapping[Key, Sequence[Call]]) -> dict[Key, list[Worker]]:
        """Wait until the workers of every group run."""
        return {key: self._cluster.wait_started(started) for key, started in calls.items()}

    def _wait_engines(self, calls: Sequence[Call]) -> list[Worker]:
        """Wait until the workers of engines run. Returns one worker for each engine, which knows those of its parts."""
        nodes = self._placement.group_of(Role.ROLLOUT).nodes_per_engine
        workers = self._cluster.wait_started(calls)
        return [
            replace(workers[first], parts=tuple(workers[first + 1 : first + nodes]))
            for first in range(0, len(workers), nodes)
        ]

    def _group(self, roles: tuple[Role, ...], workers: Sequence[Worker]) -> dict[Role, WorkerGroup]:
        """The group of some ranks, by each of its roles. It is replaceable unless a model is trained in it."""

        def prepare(others: Sequence[Worker]) -> None:
            self._join([others])
            self._load(self._load_models(roles, others))

        if any(role in self._spec.trained for role in roles):
            return dict.fromkeys(roles, WorkerGroup(workers, self._cluster.calls))
        return dict.fromkeys(roles, self._replaceable(workers, partial(self._start_ranks, roles), prepare))

    def _engine_group(self, groups: Mapping[Role, WorkerGroup], workers: Sequence[Worker]) -> EngineGroup:
        """The rollout engines. A lost one is replaced by a new one on the same devices."""
        names = [worker.name for worker in workers]

        def end(lost: Sequence[Worker]) -> None:
            with self._cluster.calls.waiting("end of lost processes"):
                self._cluster.kill(lost)

        def start(lost: Worker, error: RlhfError) -> Worker:
            if self._on_replaced is None:
                raise error
            place = names.index(lost.name)
            # One wait for all of it: the driver neither leaves Ray halfway nor begins after leaving.
            with self._cluster.calls.waiting("replacement of a lost process"):
                (engine,) = self._wait_engines(self._start_engine(place))
                if self._shares_gpus:
                    self._release_memory(groups)
                self._load(self._load_engines([engine], [place]))
            self._on_replaced(f"{error} Replaced by {engine}, which gets its requests")
            return engine

        connect = partial(self._connect, groups[Role.POLICY])
        return EngineGroup(workers, self._cluster.calls, end=end, start=start, connect=connect)

    def _reward_group(self, name: str, workers: Sequence[Worker]) -> WorkerGroup:
        """The only worker of a reward source, as a group."""
        return self._replaceable(
            workers, partial(self._start_reward, name), lambda others: self._load_again(self._load_reward(name, others))
        )

    def _replaceable(
        self, workers: Sequence[Worker], start: Callable[[], list[Call]], prepare: Callable[[Sequence[Worker]], None]
    ) -> WorkerGroup:
        """A group whose workers are started and prepared again when one is lost."""
        if self._on_replaced is None:
            return WorkerGroup(workers, self._cluster.calls)
        on_replaced = self._on_replaced

        def replace_lost(lost: Sequence[Worker], error: RlhfError) -> list[Worker]:
            # One wait for all of it: the driver neither leaves Ray halfway nor begins after leaving.
            with self._cluster.calls.waiting("replacement of lost processes"):
                self._cluster.kill(lost)
                others = self._cluster.wait_started(start())
                prepare(others)
            on_replaced(f"{error} Replaced by {', '.join(map(str, others))}, which repeat the call")
            return others

        return ReplaceableGroup(workers, self._cluster.calls, replace_lost)

    def _connect(self, policy: WorkerGroup, engines: Sequence[Worker]) -> None:
        """Connect the policy's ranks with the engines for weight syncs."""
        policy.run(
            lambda _rank, handle: handle.connect_rollout.remote(Role.POLICY, self._spec.engine, list(engines)),
            phase="connection of policy and rollout engines",
            timeout_s=self._start_timeout_s,
            peers=engines,
        )

    def _load_models(self, roles: Sequence[Role], workers: Sequence[Worker]) -> list[Call]:
        """Load the models of `roles` one after the other, in the same order on every rank."""
        calls = [
            Call(worker=worker, ref=worker.handle.load_trained_model.remote(role, model))
            for role, model in self._spec.trained.items()
            if role in roles
            for worker in workers
        ]
        return calls + [
            Call(worker=worker, ref=worker.handle.load_scorer.remote(role, scorer))
            for role, scorer in self._spec.scorers.items()
            if role in roles
            for worker in workers
        ]

    def _load_engines(self, engines: Sequence[Worker], places: Sequence[int]) -> list[Call]:
        """Load the engines in these places."""
        asked = [Call(worker=one, ref=one.handle.open_rendezvous.remote()) for one in engines if one.parts]
        found = self._cluster.calls.wait_all(asked, phase="rendezvous of engines", timeout_s=self._start_timeout_s)
        meetings = cast(list[tuple[str, int]], found) if asked else [NOWHERE] * len(engines)
        loading = zip(engines, places, meetings, strict=True)
        return [call for engine, place, meeting in loading for call in self._load_engine(engine, place, *meeting)]

    def _load_engine(self, engine: Worker, place: int, address: str, port: int) -> list[Call]:
        """Load an engine and its parts, whose processes meet at an address and port of its node."""
        assert self._spec.engine is not None
        workers = (engine, *engine.parts)
        parts = [EnginePart(index=i, host=one.node, address=address, port=port) for i, one in enumerate(workers)]
        specs = [replace(self._spec.engine, part=part) for part in parts]
        gpus = self._gpus_of_parts[place * len(workers) : (place + 1) * len(workers)]
        first = engine.handle.start.remote(specs[0], engine.name, gpus[0], engine.parts)
        return [Call(worker=engine, ref=first)] + [
            Call(worker=part, ref=part.handle.start.remote(spec, part.name, own))
            for part, spec, own in zip(engine.parts, specs[1:], gpus[1:], strict=True)
        ]

    def _load_reward(self, name: str, workers: Sequence[Worker]) -> list[Call]:
        source, concurrency = self._spec.rewards[name], self._spec.reward_concurrency
        return [Call(worker=worker, ref=worker.handle.start.remote(source, concurrency)) for worker in workers]

    def _release_memory(self, groups: Mapping[Role, WorkerGroup]) -> None:
        """Have colocated models release unused GPU memory before engines start."""
        ranks = [worker for group in colocated_models(self._placement, groups) for worker in group.workers]
        self._load([Call(worker=worker, ref=worker.handle.release_memory.remote()) for worker in ranks])

    @property
    def _shares_gpus(self) -> bool:
        """Whether engines are colocated with models on GPUs."""
        if self._spec.engine is None or self._cluster.device != "cuda":
            return False
        return self._placement.group_of(Role.ROLLOUT).is_shared_by_engines

    def _shared_gpus(self, models: Mapping[tuple[Role, ...], Sequence[Worker]]) -> list[Sequence[str]]:
        """The GPUs that each part of each engine shares with ranks; empty for engines with devices of their own."""
        if self._spec.engine is None:
            return []
        group = self._placement.group_of(Role.ROLLOUT)
        if not self._shares_gpus:
            return [()] * len(group.engine_parts)
        (roles,) = model_roles([group])
        return gpus_of_parts(group, models[roles], self._cluster.calls)

    def _load_again(self, calls: Sequence[Call]) -> None:
        self._load(calls)

    def _load(self, calls: Sequence[Call]) -> list[object]:
        return self._cluster.calls.wait_all(calls, phase="loading of models", timeout_s=self._start_timeout_s)
