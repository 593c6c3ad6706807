"""What a run starts on a cluster, and what has been started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf.actors.calls import Worker
from rlhf.actors.cluster import Cluster
from rlhf.actors.engine_group import EngineGroup
from rlhf.actors.environment_workers import EnvironmentsSpec, WorkerSessions
from rlhf.actors.groups import WorkerGroup
from rlhf.config.reward import RemoteSource
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.planning.placement import DeviceGroup, Placement
from rlhf.repair import Repair
from rlhf.types import Role

UNLOAD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What the workers of a run load."""

    trained: Mapping[Role, TrainedModelSpec] = field(default_factory=dict)
    scorers: Mapping[Role, ScorerSpec] = field(default_factory=dict)
    engine: EngineSpec | None = None
    """The rollout engines; None for offline methods."""
    rewards: Mapping[str, RemoteSource] = field(default_factory=dict)
    """Reward sources that run in a worker of their own, by label."""
    reward_concurrency: int = 1
    """Calls of each of them at the same time."""
    environments: EnvironmentsSpec | None = None
    """Workers of tools and environments; None: there are none."""

    @property
    def sequence_parallel(self) -> Mapping[Role, int]:
        """How many ranks of each model compute a micro-batch together."""
        trained = {role: spec.section.sequence_parallel_size for role, spec in self.trained.items()}
        return trained | {role: spec.section.sequence_parallel_size for role, spec in self.scorers.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The started workers of a run."""

    device: str
    """cpu or cuda."""
    groups: Mapping[Role, WorkerGroup]
    """The ranks of each model. Roles that share processes have the same group."""
    engines: EngineGroup | None
    """The rollout engines, one worker each; None for offline methods."""
    rewards: Mapping[str, WorkerGroup]
    """By the label of the reward source."""
    environments: WorkerSessions | None = None
    """Tools and environments in workers of their own."""
    sequence_parallel: Mapping[Role, int] = field(default_factory=dict)
    """How many ranks of a model compute a micro-batch together; 1 where it is not named."""
    notes: tuple[str | Repair, ...] = ()
    """What the user should know about how the models compute, each once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivingWorkers:
    """Workers that keep running when an attempt fails: models that are not trained and rollout engines, on devices of
    their own, and reward sources."""

    models: Mapping[tuple[Role, ...], WorkerGroup] = field(default_factory=dict)
    engines: Sequence[Worker] = ()
    rewards: Mapping[str, WorkerGroup] = field(default_factory=dict)

    @property
    def workers(self) -> list[Worker]:
        groups = (*self.models.values(), *self.rewards.values())
        return [*self.engines, *(worker for group in groups for worker in group.workers)]


def end_role(cluster: Cluster, workers: Workers, role: Role) -> Workers:
    """Free the memory of a role that is no longer needed. Returns the workers without it."""
    group = workers.groups[role]
    others = {other: started for other, started in workers.groups.items() if other != role}
    if group in others.values():
        group.run(lambda _rank, handle: handle.unload.remote(role), phase=f"end of {role}", timeout_s=UNLOAD_TIMEOUT_S)
    else:
        cluster.remove(group.workers)
    return replace(workers, groups=others)


def model_roles(groups: Sequence[DeviceGroup]) -> list[tuple[Role, ...]]:
    """The roles of the models in each device group, without groups that only have rollout engines."""
    models = (tuple(role for role in group.roles if role != Role.ROLLOUT) for group in groups)
    return [roles for roles in models if roles]


def colocated_models(placement: Placement, groups: Mapping[Role, WorkerGroup]) -> list[WorkerGroup]:
    """The models on the devices of the rollout engines."""
    shared = [role for role in placement.group_of(Role.ROLLOUT).roles if role is not Role.ROLLOUT]
    return list(dict.fromkeys(groups[role] for role in shared))
