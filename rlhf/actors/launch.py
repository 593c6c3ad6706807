"""Starting a run's actors: seats are taken, ranks meet, and models load side by side."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from rlhf.actors.calls import Call, Worker, traffic, wait_all
from rlhf.actors.cluster import Cluster, Seat
from rlhf.actors.groups import ReplaceableGroup, WorkerGroup
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
from rlhf.errors import RlhfError
from rlhf.planning.placement import Placement
from rlhf.types import Role

ENGINE_THREADS = 8
"""Calls that a rollout engine takes at once: one generates, others ask, sync and close."""
END_TIMEOUT_S = 60.0
Key = TypeVar("Key")
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
    rewards: Mapping[str, WorkerGroup]


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

    def __init__(
        self,
        cluster: Cluster,
        *,
        start_timeout_s: float,
        collective_timeout_s: float,
        replaced: Callable[[str], None] | None,
    ) -> None:
        """Where processes that hold nothing of the run are lost, others come instead, and `replaced` is told; None:
        their loss is an error, as that of all others."""
        self._cluster = cluster
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._replaced = replaced

    def launch(self, placement: Placement, script: Script) -> Crew:
        """Reserve, start, join, load."""
        seats = self._cluster.reserve(placement)
        env = self._environment(placement, script)
        hosted = [tuple(role for role in group.roles if role != Role.ROLLOUT) for group in placement.groups]
        sit = {roles: partial(self._seat_ranks, roles, seats[roles[0]], env) for roles in hosted if roles}
        models = self._seated({roles: seat() for roles, seat in sit.items()})
        engines = self._cluster.seated(self._seat_engines(seats, env) if script.engine is not None else [])
        rewards = self._seated({name: self._seat_reward(name) for name in script.rewards})
        self._join(list(models.values()))
        calls = [call for roles, workers in models.items() for call in _load_models(script, roles, workers)]
        calls += [Call(worker=worker, ref=worker.handle.start.remote(script.engine, worker.name)) for worker in engines]
        calls += [call for name, workers in rewards.items() for call in _load_reward(script, name, workers)]
        self._load(calls)
        groups: dict[Role, WorkerGroup] = {}
        for roles, workers in models.items():
            holds_state = any(role in script.trainees for role in roles)
            load = partial(_load_models, script, roles)
            group = WorkerGroup(workers) if holds_state else self._replaceable(workers, sit[roles], load, joins=True)
            groups |= dict.fromkeys(roles, group)
        return Crew(
            device=self._cluster.device,
            groups=groups,
            engines=tuple(engines),
            rewards={
                name: self._replaceable(workers, partial(self._seat_reward, name), partial(_load_reward, script, name))
                for name, workers in rewards.items()
            },
        )

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

    def _seat_ranks(self, roles: tuple[Role, ...], seats: Sequence[Seat], env: Mapping[str, str]) -> list[Call]:
        """Start the ranks of a group that hosts `roles`."""
        title = "".join(role.capitalize() for role in roles)
        return [
            self._cluster.seat(ModelWorker, seat, name=f"{'+'.join(roles)} rank {rank}", title=title, env=env)
            for rank, seat in enumerate(seats)
        ]

    def _seat_engines(self, seats: Mapping[Role, list[Seat]], env: Mapping[str, str]) -> list[Call]:
        return [
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

    def _seat_reward(self, name: str) -> list[Call]:
        return [self._cluster.seat(RewardWorker, None, name=f"reward {name}", title="Reward", env={})]

    def _seated(self, calls: Mapping[Key, Sequence[Call]]) -> dict[Key, list[Worker]]:
        """Wait until the actors of every group run."""
        return {key: self._cluster.seated(started) for key, started in calls.items()}

    def _replaceable(
        self,
        workers: Sequence[Worker],
        seat: Callable[[], list[Call]],
        load: Callable[[Sequence[Worker]], list[Call]],
        *,
        joins: bool = False,
    ) -> WorkerGroup:
        """A group that is seated and loaded again where it is lost."""
        if self._replaced is None:
            return WorkerGroup(workers)
        tell = self._replaced

        def replace_lost(lost: Sequence[Worker], error: RlhfError) -> list[Worker]:
            # All of it is one wait: nobody leaves Ray in its midst, and it does not begin once somebody has.
            with traffic.waiting("replacement of lost processes"):
                self._cluster.end(lost)
                others = self._cluster.seated(seat())
                if joins:
                    self._join([others])
                self._load(load(others))
            tell(f"{error} Asked again: {', '.join(map(str, others))}")
            return others

        return ReplaceableGroup(workers, replace_lost)

    def _join(self, groups: Sequence[Sequence[Worker]]) -> None:
        """Let the ranks of each group meet."""
        first = [Call(worker=ranks[0], ref=ranks[0].handle.open_meeting.remote()) for ranks in groups]
        addresses = wait_all(first, phase="meeting point of ranks", timeout_s=self._start_timeout_s)
        calls: list[Call] = []
        for ranks, place in zip(groups, addresses, strict=True):
            assert isinstance(place, tuple)
            for rank, worker in enumerate(ranks):
                meeting = Rank(
                    rank=rank,
                    world_size=len(ranks),
                    master_address=place[0],
                    master_port=place[1],
                    device=self._cluster.device,
                    timeout_s=self._collective_timeout_s,
                )
                calls.append(Call(worker=worker, ref=worker.handle.join.remote(meeting)))
        wait_all(calls, phase="meeting of ranks", timeout_s=self._start_timeout_s)

    def _load(self, calls: Sequence[Call]) -> None:
        wait_all(calls, phase="loading of models", timeout_s=self._start_timeout_s)


def _load_models(script: Script, roles: Sequence[Role], workers: Sequence[Worker]) -> list[Call]:
    """Ranks of a shared group load its roles one after the other, in the same order."""
    calls = [
        Call(worker=worker, ref=worker.handle.load_trainee.remote(role, trainee))
        for role, trainee in script.trainees.items()
        if role in roles
        for worker in workers
    ]
    return calls + [
        Call(worker=worker, ref=worker.handle.load_scorer.remote(role, scorer))
        for role, scorer in script.scorers.items()
        if role in roles
        for worker in workers
    ]


def _load_reward(script: Script, name: str, workers: Sequence[Worker]) -> list[Call]:
    return [Call(worker=worker, ref=worker.handle.start.remote(script.rewards[name])) for worker in workers]
