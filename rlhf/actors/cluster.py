"""The Ray cluster: joining or starting one, reserving devices on it, and seating actors there."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from types import TracebackType
from typing import Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf.actors import post_mortem
from rlhf.actors.calls import Call, Worker, places, told, traffic, wait_all
from rlhf.actors.connection import LOCAL, connect
from rlhf.config.run import ClusterSection
from rlhf.errors import ConfigError, StallError
from rlhf.planning.layout import core_share, lay_out
from rlhf.planning.placement import DeviceGroup, Placement, shortages
from rlhf.types import Role

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 10.0

ACCELERATOR = "accelerator_type:"

Device = str


def gpus_of(resources: Mapping[str, float]) -> list[str]:
    """The kind of each GPU among a node's resources, by the name that Ray gives it."""
    kinds = (name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    return [next(kinds, "GPU")] * int(resources.get("GPU", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one actor sits: a bundle of a placement group, and its share of the bundle."""

    group: PlacementGroup
    bundle: int
    num_cpus: float
    num_gpus: float

    def options(self) -> dict[str, object]:
        """Where Ray puts the actor that takes this seat."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=self.bundle
            ),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Devices that Ray holds for one group of a placement."""

    name: str
    group: PlacementGroup
    bundles: Sequence[Mapping[str, float]]

    @property
    def is_held(self) -> bool:
        """Whether all of it is there now: where a node was lost, Ray looks for others."""
        return bool(placement_group_table(self.group).get("state") == "CREATED")

    def missing(self, waited_s: float) -> StallError:
        """What to say of devices that did not come."""
        resources = ray.available_resources().items()
        free = ", ".join(f"{name} {amount:g}" for name, amount in resources if name in ("CPU", "GPU"))
        return StallError(
            f"placement: {self.name} waited {waited_s:g} s for {len(self.bundles)} bundle(s) of {self.bundles[0]}; "
            f"the cluster has free: {free or 'nothing'}."
        )


def require_held(
    reservations: Sequence[Reservation], patience_s: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[], None]:
    """A question to ask now and then while processes start: it raises StallError once devices have been missing for
    `patience_s`. A node may be lost without Ray's knowing yet, and others may be found for it."""
    missing_since: float | None = None

    def ask() -> None:
        nonlocal missing_since
        lost = next((one for one in reservations if not one.is_held), None)
        if lost is None:
            missing_since = None
            return
        now = clock()
        missing_since = now if missing_since is None else missing_since
        if now - missing_since >= patience_s:
            raise lost.missing(patience_s)

    return ask


class Cluster:
    """A connection to Ray, with the devices that this run holds. Closing it gives everything back."""

    def __init__(self, section: ClusterSection, namespace: str, log_folder: Path | None = None) -> None:
        """Actors write what they print into `log_folder`, a file each; without it, Ray keeps it."""
        self.address = section.address or os.environ.get("RAY_ADDRESS") or LOCAL
        self._placement_timeout_s = section.placement_timeout_s
        self._start_timeout_s = section.start_timeout_s
        self._reservations: list[Reservation] = []
        self._actors: list[ray.actor.ActorHandle] = []
        self._workers: list[Worker] = []
        self._num_starts = 1
        self._log_folder = log_folder
        self._orphans = connect(self.address, namespace, allow_unauthenticated=section.allow_unauthenticated)
        traffic.open()
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self._count()
        self.device: Device = section.device
        if section.device == "auto":
            self.device = "cuda" if sum(self.gpus_per_node) else "cpu"

    def _count(self) -> None:
        """Learn what the nodes that are alive have."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.gpus_per_node = [float(node.get("GPU", 0.0)) for node in nodes]
        self.gpu_kinds = [gpus_of(node) for node in nodes]
        self.cpus_per_node = [float(node.get("CPU", 0.0)) for node in nodes]

    def reserve(self, placement: Placement) -> dict[Role, list[Seat]]:
        """Hold devices for every group; one seat for each rank of a role, and for each engine.

        Raises:
            ConfigError: the cluster can never hold the placement; names what is short.
            StallError: devices did not become free within the placement timeout.
        """
        share = 1.0
        if self.device == "cuda":
            if problems := shortages(placement, self.gpus_per_node):
                raise ConfigError(problems)
            lay_out(placement, [int(free) for free in self.gpus_per_node])
        else:
            share = core_share(placement, self.cpus_per_node)
        seats: dict[Role, list[Seat]] = {}
        for group in placement.groups:
            bundles = self._bundles(group, share)
            reserved = placement_group(bundles, strategy="STRICT_SPREAD" if group.shape.num_nodes > 1 and
                                       group.roles != (Role.ROLLOUT,) else "PACK")  # fmt: skip
            reservation = Reservation(name=group.name, group=reserved, bundles=bundles)
            self._reservations.append(reservation)
            if not reserved.wait(timeout_seconds=self._placement_timeout_s):
                raise reservation.missing(self._placement_timeout_s)
            seats.update(self._seats(group, reserved, bundles))
        return seats

    def seat(
        self,
        actor: type,
        seat: Seat | None,
        *,
        name: str,
        title: str,
        env: Mapping[str, str],
        max_concurrency: int = 1,
    ) -> Call:
        """Start `actor` at a seat (None: anywhere, on no device), with `title` in the process list. The call ends with
        its (node, pid)."""
        titled = type(title, (actor,), {"__module__": actor.__module__})
        options: dict[str, object] = {
            "name": f"{name}{self._again}",
            "max_restarts": 0,
            "max_concurrency": max_concurrency,
        }
        if env:
            options["runtime_env"] = {"env_vars": dict(env)}
        options |= {"num_cpus": 0} if seat is None else seat.options()
        log_file = self._log_folder / f"{name.replace(' ', '_')}.log" if self._log_folder else None
        handle = ray.remote(titled).options(**options).remote(Path.cwd(), log_file)
        self._actors.append(handle)
        stacks = post_mortem.stacks_file(log_file) if log_file else None
        worker = Worker(handle=handle, name=name, node="?", node_id="?", pid=0, stacks=stacks)
        return Call(worker=worker, ref=handle.where.remote())

    def seated(self, calls: Sequence[Call]) -> list[Worker]:
        """Wait until the actors run, and learn where.

        Raises:
            StallError: they did not come up, or no devices were found for those whose node was lost.
        """
        held = require_held(self._reservations, self._placement_timeout_s)
        places = wait_all(calls, phase="start of processes", timeout_s=self._start_timeout_s, meanwhile=held)
        workers = []
        for call, place in zip(calls, places, strict=True):
            assert isinstance(place, tuple)
            address, pid, node_id = place
            workers.append(replace(call.worker, node=address, pid=pid, node_id=node_id))
        self._workers += workers
        return workers

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every process that runs."""
        return tuple(self._workers)

    def dismiss(self, workers: Sequence[Worker]) -> None:
        """End actors that are not needed any more."""
        for worker in workers:
            with suppress(ValueError):  # the run may be ending in another thread
                self._actors.remove(worker.handle)
            with suppress(ValueError):
                self._workers.remove(worker)
            ray.kill(worker.handle)

    def end(self, workers: Sequence[Worker]) -> None:
        """End actors, also where they are stopped, so that others can take their seats.

        Raises:
            StallError: a process did not end, whose device and memory the next one would miss.
        """
        left = post_mortem.end(places(workers))
        self.dismiss(workers)
        if left:
            stuck = [worker for worker in workers if (worker.node_id, worker.pid) in left]
            raise StallError(f"start: no device is free before these end: {told(stuck, left)}")
        self._num_starts += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def clear(self, spared: Sequence[Worker] = ()) -> None:
        """End the actors, and give their devices back, so that all can start again on the nodes that are left. Where
        some are `spared`, everybody's devices stay reserved.

        Raises:
            StallError: a process did not end, whose device and memory the next one would miss.
        """
        traffic.stop()
        self.end([worker for worker in self.workers if worker not in spared])
        self._empty(spared)
        self._workers[:] = spared  # without those that another thread was starting
        self._count()
        traffic.open()

    @property
    def is_whole(self) -> bool:
        """Whether all devices that were reserved are there."""
        return all(reservation.is_held for reservation in self._reservations)

    def close(self) -> None:
        """End the actors, give the devices back and leave."""
        self._empty()
        ray.shutdown()
        self._orphans.close()

    @property
    def _again(self) -> str:
        """What tells actors of a later start from those that Ray may still remember under the same name."""
        return f" ({self._num_starts})" if self._num_starts > 1 else ""

    def _empty(self, spared: Sequence[Worker] = ()) -> None:
        """End the actors, and with them every wait for one."""
        traffic.stop()
        kept = [worker.handle for worker in spared]
        for actor in self._actors:
            if actor not in kept:
                ray.kill(actor)
        self._actors[:] = kept
        if not traffic.close(LEAVE_TIMEOUT_S):
            logger.warning("ray: calls were still under way after %g s", LEAVE_TIMEOUT_S)
        while self._reservations and not spared:
            remove_placement_group(self._reservations.pop().group)

    def _bundles(self, group: DeviceGroup, share: float) -> list[dict[str, float]]:
        """One bundle a node of the group. Without GPUs a device is a `share` of a core."""
        each = group.shape.num_devices_per_node
        if self.device == "cuda":
            return [{"GPU": each, "CPU": each}] * group.shape.num_nodes
        return [{"CPU": floor(share * each * 100) / 100}] * group.shape.num_nodes

    def _seats(
        self, group: DeviceGroup, reserved: PlacementGroup, bundles: Sequence[Mapping[str, float]]
    ) -> dict[Role, list[Seat]]:
        processes = group.num_processes_per_device
        each = group.shape.num_devices_per_node

        def seat(bundle: int, num_devices: int) -> Seat:
            share = num_devices / each / processes
            return Seat(
                group=reserved,
                bundle=bundle,
                num_cpus=floor(bundles[bundle]["CPU"] * share * 1000) / 1000,
                num_gpus=num_devices if self.device == "cuda" else 0.0,
            )

        ranks = [seat(rank // each, 1) for rank in range(group.shape.num_devices)]
        seats: dict[Role, list[Seat]] = {role: ranks for role in group.roles if role != Role.ROLLOUT}
        if Role.ROLLOUT in group.roles:
            width = group.devices_per_engine
            engines = [seat(group.ranks_beside(engine)[0] // each, width) for engine in range(group.num_engines)]
            # Ray gives two halves of one GPU to two ranks before it gives one of each to a rank and an engine. So
            # ranks have their GPUs whole, and engines are told which those are.
            shared = group.is_shared_by_engines
            seats[Role.ROLLOUT] = [replace(one, num_gpus=0.0) if shared else one for one in engines]
        return seats
