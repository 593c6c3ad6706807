"""Starting a run's actors: seats are taken, ranks meet, and models load side by side."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, cast

from ray.exceptions import RayError

from rlhf.actors import environment
from rlhf.actors.calls import Call, Worker, traffic, wait_all
from rlhf.actors.cluster import Cluster, Seat
from rlhf.actors.groups import ReplaceableGroup, WorkerGroup
from rlhf.actors.ranks import join_ranks
from rlhf.actors.workers import ModelWorker, RewardWorker, RolloutWorker
from rlhf.config.reward import RemoteSource
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.errors import RlhfError
from rlhf.planning.placement import DeviceGroup, Placement
from rlhf.types import Role

ENGINE_THREADS = 8
"""Calls that a rollout engine takes at once: one generates, others ask, sync and close."""
END_TIMEOUT_S = 60.0
WELL_TIMEOUT_S = 10.0
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """Who plays in a run: what each role loads."""

    trained: Mapping[Role, TrainedModelSpec] = field(default_factory=dict)
    scorers: Mapping[Role, ScorerSpec] = field(default_factory=dict)
    engine: EngineSpec | None = None
    rewards: Mapping[str, RemoteSource] = field(default_factory=dict)
    """Reward sources with an actor of their own by their names in the logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The started actors, and the kind of device that they compute on."""

    device: str
    groups: Mapping[Role, WorkerGroup]
    engines: WorkerGroup | None
    """The rollout engines, one worker each; None: the run does not sample."""
    rewards: Mapping[str, WorkerGroup]


def end_role(cluster: Cluster, workers: Workers, role: Role) -> Workers:
    """Give back the memory of a role that is not needed any more. Returns the crew without it."""
    group = workers.groups[role]
    others = {other: started for other, started in workers.groups.items() if other != role}
    if group in others.values():
        group.run(lambda _rank, handle: handle.unload.remote(role), phase=f"end of {role}", timeout_s=END_TIMEOUT_S)
    else:
        cluster.dismiss(group.workers)
    return replace(workers, groups=others)


def gpus_of_engines(group: DeviceGroup, ranks: Sequence[Worker]) -> list[Sequence[str]]:
    """The GPUs that each engine of a group shares with its ranks. Raises: as `wait_all`."""
    calls = [Call(worker=rank, ref=rank.handle.gpus.remote()) for rank in ranks]
    gpus = cast(list[list[str]], wait_all(calls, phase="naming of GPUs", timeout_s=END_TIMEOUT_S))
    return [[gpus[rank][0] for rank in group.ranks_beside(engine)] for engine in range(group.num_engines)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivingWorkers:
    """Processes that outlive the failure of others: models that only compute and engines, on devices of their own, and
    reward sources."""

    models: Mapping[tuple[Role, ...], WorkerGroup] = field(default_factory=dict)
    engines: Sequence[Worker] = ()
    rewards: Mapping[str, WorkerGroup] = field(default_factory=dict)

    @property
    def workers(self) -> list[Worker]:
        groups = (*self.models.values(), *self.rewards.values())
        return [*self.engines, *(worker for group in groups for worker in group.workers)]


def model_roles(groups: Sequence[DeviceGroup]) -> list[tuple[Role, ...]]:
    """Of each group, the models that its processes hold."""
    models = (tuple(role for role in group.roles if role != Role.ROLLOUT) for group in groups)
    return [roles for roles in models if roles]


def colocated_models(placement: Placement, groups: Mapping[Role, WorkerGroup]) -> list[WorkerGroup]:
    """The models on the devices of the rollout engines; `groups` by each of their roles."""
    shared = [role for role in placement.group_of(Role.ROLLOUT).roles if role is not Role.ROLLOUT]
    return list(dict.fromkeys(groups[role] for role in shared))


def is_healthy(group: WorkerGroup) -> bool:
    """Whether every process answers soon, and with nothing left of what it was asked."""
    calls = [Call(worker=worker, ref=worker.handle.reset.remote()) for worker in group.workers]
    try:
        wait_all(calls, phase="sign of life", timeout_s=WELL_TIMEOUT_S)
    except (RlhfError, RayError):
        return False
    return True


class Launcher:
    """Starts the actors of one script at their places on a cluster, and others where some are lost.

    Every wait ends after `start_timeout_s` with an error that names who did not come; the trial of reward sources has
    the deadlines of these.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        script: LaunchSpec,
        *,
        start_timeout_s: float,
        collective_timeout_s: float,
        replaced: Callable[[str], None] | None,
    ) -> None:
        """Where processes are lost that hold nothing that others cannot be given, others come instead, and `replaced`
        is told; None: their loss is an error, as that of all others."""
        self._cluster = cluster
        self._placement = placement
        self._script = script
        self._start_timeout_s = start_timeout_s
        self._join = partial(
            join_ranks,
            device=cluster.device,
            start_timeout_s=start_timeout_s,
            collective_timeout_s=collective_timeout_s,
        )
        self._replaced = replaced
        num_cores = max(cluster.cpus_per_node, default=1.0)
        self._env = environment.of_all(
            placement,
            cluster.device,
            num_cores,
            os.environ,
            runs_ahead=script.engine is not None and script.engine.section.max_lag > 0,
        )
        self._env_of_ranks = self._env | environment.of_ranks(placement, cluster.device, num_cores, os.environ)
        self._seats: Mapping[Role, list[Seat]] = {}
        self._gpus_of_engines: list[Sequence[str]] = []
        self._spared = SurvivingWorkers()
        self._crew: Workers | None = None

    def spare(self) -> list[Worker]:
        """The processes of the last crew that the next one can have. What trains is not among them, nor who shares its
        devices; of the others, every process of a group must be there and answer soon. Empty where a node is gone.

        Engines that take weights by other media than gloo start again: their communicator has lost a peer."""
        workers, self._crew, self._spared = self._crew, None, SurvivingWorkers()
        if workers is None or not self._cluster.is_whole:
            return []
        apart = [group for group in self._placement.groups if not group.is_shared_by_engines]
        models = {
            roles: workers.groups[roles[0]]
            for roles in model_roles(apart)
            if not any(role in self._script.trained for role in roles)
        }
        engine = self._script.engine
        can_stay = engine is not None and engine.sync_backend == "gloo"
        fleet = workers.engines if can_stay and any(Role.ROLLOUT in group.roles for group in apart) else None
        self._spared = SurvivingWorkers(
            models={roles: group for roles, group in models.items() if is_healthy(group)},
            engines=fleet.workers if fleet is not None and is_healthy(fleet) else (),
            rewards={name: group for name, group in workers.rewards.items() if is_healthy(group)},
        )
        return self._spared.workers

    def launch(self, try_rewards: Callable[[Mapping[str, WorkerGroup]], None]) -> Workers:
        """Reserve, start, join, load. Reward sources are there long before models are: `try_rewards` gets them while
        these load, so that what it raises is known without waiting for them."""
        script, spared = self._script, self._spared
        if not spared.workers:
            self._seats = self._cluster.reserve(self._placement)
        missing = [roles for roles in model_roles(self._placement.groups) if roles not in spared.models]
        models = self._seated({roles: self._seat_ranks(roles) for roles in missing})
        engines = spared.engines
        if script.engine is not None and not engines:
            engines = self._cluster.seated(self._seat_engines())
        sources = [name for name in script.rewards if name not in spared.rewards]
        rewards = self._seated({name: self._seat_reward(name) for name in sources})
        self._gpus_of_engines = self._shared_gpus(models)
        self._join(list(models.values()))
        calls = [call for roles, workers in models.items() for call in self._load_models(roles, workers)]
        starts = engines is not spared.engines
        calls += self._load_engines(engines) if starts and not self._shares_gpus else []
        self._load([call for name, workers in rewards.items() for call in self._load_reward(name, workers)])
        try_rewards({name: WorkerGroup(workers) for name, workers in rewards.items()})
        self._load(calls)
        groups = {role: group for roles, group in spared.models.items() for role in roles}
        groups |= {role: group for roles, ranks in models.items() for role, group in self._group(roles, ranks).items()}
        if starts and self._shares_gpus:
            # Afterwards: vLLM counts as its own what anybody takes of the GPU while it starts.
            self._make_room(groups)
            self._load(self._load_engines(engines))
        if script.engine is not None:
            self._connect(groups[Role.POLICY], engines)
        self._crew = Workers(
            device=self._cluster.device,
            groups=groups,
            engines=self._fleet(groups, engines) if script.engine is not None else None,
            rewards=dict(spared.rewards) | {name: self._reward(name, workers) for name, workers in rewards.items()},
        )
        return self._crew

    def _seat_ranks(self, roles: tuple[Role, ...]) -> list[Call]:
        """Start the ranks of a group that hosts `roles`."""
        title = "".join(role.capitalize() for role in roles)
        return [
            self._cluster.seat(
                ModelWorker, seat, name=f"{'+'.join(roles)} rank {rank}", title=title, env=self._env_of_ranks
            )
            for rank, seat in enumerate(self._seats[roles[0]])
        ]

    def _seat_engines(self) -> list[Call]:
        return [
            self._cluster.seat(
                RolloutWorker,
                seat,
                name=f"rollout engine {index}",
                title="Rollout",
                env=self._env,
                max_concurrency=ENGINE_THREADS,
            )
            for index, seat in enumerate(self._seats[Role.ROLLOUT])
        ]

    def _seat_reward(self, name: str) -> list[Call]:
        return [self._cluster.seat(RewardWorker, None, name=f"reward {name}", title="Reward", env={})]

    def _seated(self, calls: Mapping[Key, Sequence[Call]]) -> dict[Key, list[Worker]]:
        """Wait until the actors of every group run."""
        return {key: self._cluster.seated(started) for key, started in calls.items()}

    def _group(self, roles: tuple[Role, ...], workers: Sequence[Worker]) -> dict[Role, WorkerGroup]:
        """The group of some ranks, by each of its roles. A model that learns holds what nobody can be given."""

        def prepare(others: Sequence[Worker]) -> None:
            self._join([others])
            self._load(self._load_models(roles, others))

        learns = any(role in self._script.trained for role in roles)
        seat = partial(self._seat_ranks, roles)
        return dict.fromkeys(roles, WorkerGroup(workers) if learns else self._replaceable(workers, seat, prepare))

    def _fleet(self, groups: Mapping[Role, WorkerGroup], workers: Sequence[Worker]) -> WorkerGroup:
        """The rollout engines. Those that come later receive the weights that those before had received; where
        rollouts run ahead, the policy has others by then."""

        policy = groups[Role.POLICY]

        def prepare(others: Sequence[Worker]) -> None:
            if self._shares_gpus:
                self._make_room(groups)
            self._load(self._load_engines(others))
            self._connect(policy, others)
            policy.run(
                lambda _rank, handle: handle.send_weights_again.remote(Role.POLICY),
                phase="weight sync of replaced engines",
                timeout_s=self._start_timeout_s,
            )

        assert self._script.engine is not None
        if self._script.engine.section.max_lag:
            return WorkerGroup(workers)
        return self._replaceable(workers, self._seat_engines, prepare)

    def _reward(self, name: str, workers: Sequence[Worker]) -> WorkerGroup:
        """The only process of a reward source, as a group."""
        return self._replaceable(
            workers, partial(self._seat_reward, name), lambda others: self._load(self._load_reward(name, others))
        )

    def _replaceable(
        self, workers: Sequence[Worker], seat: Callable[[], list[Call]], prepare: Callable[[Sequence[Worker]], None]
    ) -> WorkerGroup:
        """A group that is seated and prepared again where it is lost."""
        if self._replaced is None:
            return WorkerGroup(workers)
        tell = self._replaced

        def replace_lost(lost: Sequence[Worker], error: RlhfError) -> list[Worker]:
            # All of it is one wait: nobody leaves Ray in its midst, and it does not begin once somebody has.
            with traffic.waiting("replacement of lost processes"):
                self._cluster.end(lost)
                others = self._cluster.seated(seat())
                prepare(others)
            tell(f"{error} ReferenceSequence again: {', '.join(map(str, others))}")
            return others

        return ReplaceableGroup(workers, replace_lost)

    def _connect(self, policy: WorkerGroup, engines: Sequence[Worker]) -> None:
        """Bring the policy's ranks and the engines together for weight syncs."""
        policy.run(
            lambda _rank, handle: handle.connect_rollout.remote(Role.POLICY, self._script.engine, list(engines)),
            phase="joining policy and rollout engines",
            timeout_s=self._start_timeout_s,
        )

    def _load_models(self, roles: Sequence[Role], workers: Sequence[Worker]) -> list[Call]:
        """Ranks of a shared group load its roles one after the other, in the same order."""
        calls = [
            Call(worker=worker, ref=worker.handle.load_trained_model.remote(role, spec))
            for role, spec in self._script.trained.items()
            if role in roles
            for worker in workers
        ]
        return calls + [
            Call(worker=worker, ref=worker.handle.load_scorer.remote(role, scorer))
            for role, scorer in self._script.scorers.items()
            if role in roles
            for worker in workers
        ]

    def _load_engines(self, workers: Sequence[Worker]) -> list[Call]:
        spec = self._script.engine
        return [
            Call(worker=worker, ref=worker.handle.start.remote(spec, worker.name, gpus))
            for worker, gpus in zip(workers, self._gpus_of_engines, strict=True)
        ]

    def _make_room(self, groups: Mapping[Role, WorkerGroup]) -> None:
        """Have models give back what they keep unused of the GPUs on which engines start."""
        ranks = [worker for group in colocated_models(self._placement, groups) for worker in group.workers]
        self._load([Call(worker=worker, ref=worker.handle.give_back.remote()) for worker in ranks])

    @property
    def _shares_gpus(self) -> bool:
        """Whether engines live on GPUs of models."""
        if self._script.engine is None or self._cluster.device != "cuda":
            return False
        return self._placement.group_of(Role.ROLLOUT).is_shared_by_engines

    def _shared_gpus(self, models: Mapping[tuple[Role, ...], Sequence[Worker]]) -> list[Sequence[str]]:
        """Of each engine, those of the ranks beside it; none where its devices are its own."""
        if self._script.engine is None:
            return []
        group = self._placement.group_of(Role.ROLLOUT)
        if not self._shares_gpus:
            return [()] * group.num_engines
        (roles,) = model_roles([group])
        return gpus_of_engines(group, models[roles])

    def _load_reward(self, name: str, workers: Sequence[Worker]) -> list[Call]:
        source = self._script.rewards[name]
        return [Call(worker=worker, ref=worker.handle.start.remote(source)) for worker in workers]

    def _load(self, calls: Sequence[Call]) -> None:
        wait_all(calls, phase="loading of models", timeout_s=self._start_timeout_s)
