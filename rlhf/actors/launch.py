"""Starting a run's actors: seats are taken, ranks meet, and models load side by side."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rlhf.actors.calls import Call, Worker, wait_all
from rlhf.actors.cluster import Cluster, Seat
from rlhf.actors.groups import WorkerGroup
from rlhf.actors.workers import (
    EngineSpec,
    ModelWorker,
    Rank,
    RewardWorker,
    RolloutWorker,
    ScorerSpec,
    SyncSpec,
    TraineeSpec,
)
from rlhf.config.reward import RemoteSource
from rlhf.planning.placement import Placement
from rlhf.types import Role

ENGINE_THREADS = 8
"""Calls that a rollout engine takes at once: one generates, others ask, sync and close."""
END_TIMEOUT_S = 60.0
OPENMP_SPINS = "1000"
"""How often an OpenMP thread looks for its mates before it sleeps. The library's own, a hundred times more, makes two
roles that compute at once on the same cores up to four times slower than one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Who plays in a run: what each role loads."""

    trainees: Mapping[Role, TraineeSpec] = field(default_factory=dict)
    scorers: Mapping[Role, ScorerSpec] = field(default_factory=dict)
    engine: EngineSpec | None = None
    rewards: Mapping[str, RemoteSource] = field(default_factory=dict)
    """Reward sources with an actor of their own by their names in the logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The started actors, and the kind of device that they compute on."""

    device: str
    groups: Mapping[Role, WorkerGroup]
    engines: tuple[Worker, ...]
    rewards: Mapping[str, Worker]

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every process."""
        models = [worker for group in dict.fromkeys(self.groups.values()) for worker in group.workers]
        return (*models, *self.engines, *self.rewards.values())


def end_role(cluster: Cluster, crew: Crew, role: Role) -> Crew:
    """Give back the memory of a role that is not needed any more. Returns the crew without it."""
    group = crew.groups[role]
    others = {other: started for other, started in crew.groups.items() if other != role}
    if group in others.values():
        group.run(lambda _rank, handle: handle.unload.remote(role), phase=f"end of {role}", timeout_s=END_TIMEOUT_S)
    else:
        cluster.dismiss(group.workers)
    return replace(crew, groups=others)


class Launcher:
    """Starts the actors of a script on a cluster.

    Every wait ends after `start_timeout_s` with an error that names who did not come.
    """

    def __init__(self, cluster: Cluster, *, start_timeout_s: float, collective_timeout_s: float) -> None:
        self._cluster = cluster
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s

    def launch(self, placement: Placement, script: Script) -> Crew:
        """Reserve, start, join, load."""
        seats = self._cluster.reserve(placement)
        env = self._environment(placement, script)
        groups = self._start_groups(placement, seats, env)
        engines = self._start_engines(seats, env, script.engine)
        rewards = self._start_rewards(script)
        self._join(list(dict.fromkeys(groups.values())))
        self._load(script, groups, engines, rewards)
        return Crew(device=self._cluster.device, groups=groups, engines=tuple(engines), rewards=rewards)

    def connect(self, crew: Crew, spec: SyncSpec) -> None:
        """Bring the policy's ranks and the engines together for weight syncs."""
        crew.groups[Role.POLICY].run(
            lambda _rank, handle: handle.connect_rollout.remote(Role.POLICY, spec),
            phase="joining policy and rollout engines",
            timeout_s=self._start_timeout_s,
        )

    def _environment(self, placement: Placement, script: Script) -> dict[str, str]:
        """Variables of every actor. Cores are shared out by what works at the same time: the ranks of the widest role,
        wherever they live, so that a role computes the same bits on a group of its own and on a shared one. Groups that
        compute at once thus have more threads than cores; there, threads that wait for each other soon leave theirs."""
        if self._cluster.device == "cuda":
            return {"DS_ACCELERATOR": "cuda"}
        cores = int(max(self._cluster.cpus_per_node, default=1.0))
        ranks = [group.shape.num_devices_per_node for group in placement.groups if group.roles != (Role.ROLLOUT,)]
        engines = [group.num_engines for group in placement.groups]
        widest = max(*ranks, *engines)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // widest))
        env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}
        runs_ahead = script.engine is not None and script.engine.section.max_lag > 0
        if len(ranks) + runs_ahead > 1 and "GOMP_SPINCOUNT" not in os.environ:
            env["GOMP_SPINCOUNT"] = OPENMP_SPINS
        return env

    def _start_groups(
        self, placement: Placement, seats: Mapping[Role, list[Seat]], env: Mapping[str, str]
    ) -> dict[Role, WorkerGroup]:
        calls: dict[tuple[Role, ...], list[Call]] = {}
        for group in placement.groups:
            models = tuple(role for role in group.roles if role != Role.ROLLOUT)
            if models:
                title = "".join(role.capitalize() for role in models)
                calls[models] = [
                    self._cluster.seat(ModelWorker, seat, name=f"{'+'.join(models)} rank {rank}", title=title, env=env)
                    for rank, seat in enumerate(seats[models[0]])
                ]
        started = {models: WorkerGroup(self._cluster.seated(ranks)) for models, ranks in calls.items()}
        return {role: group for models, group in started.items() for role in models}

    def _start_engines(
        self, seats: Mapping[Role, list[Seat]], env: Mapping[str, str], spec: EngineSpec | None
    ) -> list[Worker]:
        if spec is None:
            return []
        return self._cluster.seated(
            [
                self._cluster.seat(
                    RolloutWorker,
                    seat,
                    name=f"rollout engine {index}",
                    title="Rollout",
                    env=env,
                    max_concurrency=ENGINE_THREADS,
                )
                for index, seat in enumerate(seats[Role.ROLLOUT])
            ]
        )

    def _start_rewards(self, script: Script) -> dict[str, Worker]:
        calls = [
            self._cluster.seat(RewardWorker, None, name=f"reward {name}", title="Reward", env={})
            for name in script.rewards
        ]
        return dict(zip(script.rewards, self._cluster.seated(calls), strict=True))

    def _join(self, groups: list[WorkerGroup]) -> None:
        """Let the ranks of each group meet."""
        first = [Call(worker=group.workers[0], ref=group.workers[0].handle.open_meeting.remote()) for group in groups]
        addresses = wait_all(first, phase="meeting point of ranks", timeout_s=self._start_timeout_s)
        calls: list[Call] = []
        for group, place in zip(groups, addresses, strict=True):
            assert isinstance(place, tuple)
            for rank, worker in enumerate(group.workers):
                meeting = Rank(
                    rank=rank,
                    world_size=len(group.workers),
                    master_address=place[0],
                    master_port=place[1],
                    device=self._cluster.device,
                    timeout_s=self._collective_timeout_s,
                )
                calls.append(Call(worker=worker, ref=worker.handle.join.remote(meeting)))
        wait_all(calls, phase="meeting of ranks", timeout_s=self._start_timeout_s)

    def _load(
        self,
        script: Script,
        groups: Mapping[Role, WorkerGroup],
        engines: list[Worker],
        rewards: Mapping[str, Worker],
    ) -> None:
        """Load everything at once. Ranks of a shared group load its roles one after the other, in the same order."""
        calls = [
            Call(worker=worker, ref=worker.handle.load_trainee.remote(role, trainee))
            for role, trainee in script.trainees.items()
            for worker in groups[role].workers
        ]
        calls += [
            Call(worker=worker, ref=worker.handle.load_scorer.remote(role, scorer))
            for role, scorer in script.scorers.items()
            for worker in groups[role].workers
        ]
        calls += [Call(worker=worker, ref=worker.handle.start.remote(script.engine, worker.name)) for worker in engines]
        calls += [
            Call(worker=worker, ref=worker.handle.start.remote(script.rewards[name]))
            for name, worker in rewards.items()
        ]
        wait_all(calls, phase="loading of models", timeout_s=self._start_timeout_s)
