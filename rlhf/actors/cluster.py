"""The Ray cluster of a run: joining or starting it, reserving bundles in placement groups, starting workers."""

import logging
import os
import shlex
import socket
import sys
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

from rlhf.actors import forked_worker, post_mortem
from rlhf.actors.calls import Call, Worker, with_parts
from rlhf.actors.connection import LOCAL, connect, disconnect
from rlhf.actors.control_store import JOINED_TIMEOUT_S, LOCAL_TIMEOUT_S, ControlStoreWatch
from rlhf.actors.waiting import CallObserver, RemoteCalls, describe_late, processes_by_node
from rlhf.config.run import ClusterSection
from rlhf.engines.process.repairs import log_repair
from rlhf.errors import ConfigError, StallError, WorkerLostError
from rlhf.planning.layout import bundle_sizes, bundles_apart, core_share, lay_out
from rlhf.planning.placement import DeviceGroup, Placement, shortages
from rlhf.repair import Repaired
from rlhf.types import Role

logger = logging.getLogger(__name__)

A_LITTLE = 0.001
"""Of the resource by which Ray names a node: each node has 1."""
LEAVE_TIMEOUT_S = 10.0

ACCELERATOR = "accelerator_type:"

Device = str


def gpus_of(resources: Mapping[str, float]) -> list[str]:
    """The model of each GPU among a node's resources, by Ray's name for it."""
    kinds = (name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    return [next(kinds, "GPU")] * int(resources.get("GPU", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSlot:
    """Where one worker runs: its share of a bundle of a placement group."""

    placement_group: PlacementGroup
    bundle: int
    num_cpus: float
    num_gpus: float

    def options(self) -> dict[str, object]:
        """The Ray options of the worker's actor."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.placement_group, placement_group_bundle_index=self.bundle
            ),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservedBundles:
    """A placement group: of one device group, or of one rollout engine that is spread over nodes."""

    name: str
    placement_group: PlacementGroup
    bundles: Sequence[Mapping[str, float]]

    @property
    def is_ready(self) -> bool:
        """Whether all bundles exist now. When a node is lost, Ray looks for another one for its bundles."""
        return bool(placement_group_table(self.placement_group).get("state") == "CREATED")

    def missing(self, waited_s: float) -> StallError:
        """The error for bundles that did not become available."""
        resources = ray.available_resources().items()
        free = ", ".join(f"{name} {amount:g}" for name, amount in resources if name in ("CPU", "GPU"))
        return StallError(
            f"placement: {self.name} waited {waited_s:g} s for {len(self.bundles)} bundle(s) of {self.bundles[0]}; "
            f"the cluster has free: {free or 'nothing'}."
        )


def bundle_check(
    reserved: Sequence[ReservedBundles], timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[], None]:
    """A check to call repeatedly while workers start: it raises StallError once bundles have been missing for
    `timeout_s`. Until then Ray may not have noticed a lost node, or may still find another one."""
    missing_since: float | None = None

    def check() -> None:
        nonlocal missing_since
        lost = next((bundles for bundles in reserved if not bundles.is_ready), None)
        if lost is None:
            missing_since = None
            return
        now = clock()
        missing_since = now if missing_since is None else missing_since
        if now - missing_since >= timeout_s:
            raise lost.missing(timeout_s)

    return check


class Cluster:
    """A connection to Ray, with the bundles and workers of one run. Closing it releases all of them."""

    def __init__(
        self,
        section: ClusterSection,
        namespace: str,
        log_folder: Path | None = None,
        observers: Sequence[CallObserver] = (),
        on_lost: Callable[[WorkerLostError], None] | None = None,
        repaired: Repaired = log_repair,
    ) -> None:
        """Each worker writes its output to a file in `log_folder`; without it, to Ray's logs. `observers` see every
        wait for a remote call. `on_lost` is called, in another thread, when Ray's control store is gone, seconds before
        Ray ends this process. `repaired` is told of a start of Ray that had to be repeated."""
        self.address = section.address or os.environ.get("RAY_ADDRESS") or LOCAL
        self._placement_timeout_s = section.placement_timeout_s
        self._start_timeout_s = section.start_timeout_s
        self._forks_workers = section.fork_workers and sys.platform == "linux"
        self._reserved: list[ReservedBundles] = []
        self._actors: list[ray.actor.ActorHandle] = []
        self._workers: list[Worker] = []
        self._num_starts = 1
        self._log_folder = log_folder
        self._orphans = connect(
            self.address, namespace, allow_unauthenticated=section.allow_unauthenticated, repaired=repaired
        )
        self.calls = RemoteCalls(observers)
        self._watch: ControlStoreWatch | None = None
        if on_lost is not None:
            timeout_s = LOCAL_TIMEOUT_S if self.address == LOCAL else JOINED_TIMEOUT_S
            self._watch = ControlStoreWatch(ray.get_runtime_context().gcs_address, on_lost, timeout_s)
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self._count_devices()
        self.device: Device = section.device
        if section.device == "auto":
            self.device = "cuda" if sum(self.gpus_per_node) else "cpu"

    def _count_devices(self) -> None:
        """Read what the nodes that are alive have. Raises WorkerLostError where none is."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not nodes:
            raise WorkerLostError("ray: no node of the cluster is alive: its raylet has ended. Continue with --resume.")
        self.gpus_per_node = [float(node.get("GPU", 0.0)) for node in nodes]
        self.gpu_kinds = [gpus_of(node) for node in nodes]
        self.cpus_per_node = [float(node.get("CPU", 0.0)) for node in nodes]

    def reserve(self, placement: Placement) -> dict[Role, list[WorkerSlot]]:
        """Reserve placement groups for every device group. Returns one slot for each rank of a role, and for each part
        of each rollout engine.

        Raises:
            ConfigError: the cluster is too small for the placement; names what is short.
            StallError: devices did not become free within the placement timeout.
        """
        share = 1.0
        if self.device == "cuda":
            if problems := shortages(placement, self.gpus_per_node):
                raise ConfigError(problems)
            lay_out(placement, [int(free) for free in self.gpus_per_node])
        else:
            share = core_share(placement, self.cpus_per_node)
        slots: dict[Role, list[WorkerSlot]] = {}
        for group in placement.groups:
            slots.update(self._slots(group, self._reserve(group, share)))
        return slots

    def start_worker(
        self,
        actor: type,
        slot: WorkerSlot | None,
        *,
        name: str,
        title: str,
        env: Mapping[str, str],
        max_concurrency: int = 1,
        node: str | None = None,
    ) -> Call:
        """Start `actor` in a slot (None: without devices, at the address `node`, or on any node), with `title` in the
        process list, and with the variables `env`: of workers of a run, all of which import what models need. The call
        returns the location of its process; pass it to `wait_started`."""
        titled = type(title, (actor,), {"__module__": actor.__module__})
        options: dict[str, object] = {
            "name": f"{name}{self._start_suffix}",
            "max_restarts": 0,
            "max_concurrency": max_concurrency,
        }
        if env:
            options["runtime_env"] = {"env_vars": dict(env)} | self._interpreter
        options |= {"num_cpus": 0} if slot is None else slot.options()
        if node is not None:
            # Ray gives an actor that needs no resource to any node, whatever its strategy says. Each node has this one.
            options["resources"] = {f"node:{node}": A_LITTLE}
        log_file = self._log_folder / f"{name.replace(' ', '_')}.log" if self._log_folder else None
        handle = ray.remote(titled).options(**options).remote(Path.cwd(), log_file)
        self._actors.append(handle)
        stacks = post_mortem.stacks_file(log_file) if log_file else None
        worker = Worker(handle=handle, name=name, node="?", node_id="?", pid=0, stacks=stacks)
        return Call(worker=worker, ref=handle.location.remote())

    @property
    def _interpreter(self) -> dict[str, str]:
        """What runs in place of Python for workers of a run that are all on the CPUs of this machine."""
        if self.device == "cuda" or not self._forks_workers:
            return {}
        if {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} != {socket.gethostname()}:
            return {}
        return {"py_executable": f"{shlex.quote(sys.executable)} -I {shlex.quote(forked_worker.__file__)}"}

    def wait_started(self, calls: Sequence[Call]) -> list[Worker]:
        """Wait until the workers run. Returns them with their nodes and process ids.

        Raises:
            StallError: they did not start, or Ray found no bundles for those whose node was lost.
        """
        check = bundle_check(self._reserved, self._placement_timeout_s)
        locations = self.calls.wait_all(
            calls, phase="start of processes", timeout_s=self._start_timeout_s, meanwhile=check
        )
        workers = []
        for call, location in zip(calls, locations, strict=True):
            assert isinstance(location, tuple)
            address, pid, node_id = location
            workers.append(replace(call.worker, node=address, pid=pid, node_id=node_id))
        self._workers += workers
        return workers

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every worker that runs."""
        return tuple(self._workers)

    def remove(self, workers: Sequence[Worker]) -> None:
        """End workers that are no longer needed, with their parts."""
        for worker in with_parts(workers):
            with suppress(ValueError):  # the run may be ending in another thread
                self._actors.remove(worker.handle)
            with suppress(ValueError):
                self._workers.remove(worker)
            ray.kill(worker.handle)

    def kill(self, workers: Sequence[Worker]) -> None:
        """Kill workers and their parts, and wait until their processes are gone, also those that are stopped. Then new
        workers can use their slots.

        Raises:
            StallError: a process did not end, and still uses its device and memory.
        """
        left = post_mortem.kill(processes_by_node(workers))
        self.remove(workers)
        if left:
            stuck = [worker for worker in with_parts(workers) if (worker.node_id, worker.pid) in left]
            raise StallError(f"start: no device is free before these end: {describe_late(stuck, left)}")
        self._num_starts += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def clear(self, surviving: Sequence[Worker] = ()) -> None:
        """End all workers except `surviving`, so that a new attempt can start on the nodes that are left. Bundles are
        released as well, unless there are surviving workers.

        Raises:
            StallError: a process did not end, and still uses its device and memory.
        """
        self.calls.stop()
        kept = with_parts(surviving)
        self.kill([worker for worker in self.workers if worker not in kept])
        self._empty(kept)
        self._workers[:] = kept  # without those that another thread was starting
        self._count_devices()
        self.calls.open()

    @property
    def cpu_nodes(self) -> list[str]:
        """The addresses of the nodes that are alive and have CPUs."""
        return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    @property
    def is_complete(self) -> bool:
        """Whether all reserved bundles exist."""
        return all(bundles.is_ready for bundles in self._reserved)

    def close(self) -> None:
        """End all workers, release the bundles and disconnect from Ray."""
        self._empty()
        if self._watch is not None:
            self._watch.stop()
        disconnect(self._orphans)

    @property
    def _start_suffix(self) -> str:
        """Distinguishes the actor names of a later start: Ray may still remember the earlier ones."""
        return f" ({self._num_starts})" if self._num_starts > 1 else ""

    def _empty(self, surviving: Sequence[Worker] = ()) -> None:
        """End the workers, and thereby every wait for one."""
        self.calls.stop()
        kept = [worker.handle for worker in surviving]
        for actor in self._actors:
            if actor not in kept:
                ray.kill(actor)
        self._actors[:] = kept
        if not self.calls.close(LEAVE_TIMEOUT_S):
            logger.warning("ray: calls were still under way after %g s", LEAVE_TIMEOUT_S)
        while self._reserved and not surviving:
            remove_placement_group(self._reserved.pop().placement_group)

    def _reserve(self, group: DeviceGroup, share: float) -> list[WorkerSlot]:
        """Reserve the bundles of a group: one for each node of its models, and for each part of its engines. Without
        GPUs a device is a `share` of a CPU core. Returns the whole of each bundle.

        Bundles that must be on different nodes are a placement group of their own. Raises: as `reserve`.
        """
        sizes, apart = bundle_sizes(group), bundles_apart(group)
        together = apart if apart > 1 else len(sizes)
        slots: list[WorkerSlot] = []
        for start in range(0, len(sizes), together):
            bundles = [self._bundle(devices, share) for devices in sizes[start : start + together]]
            reserved = placement_group(bundles, strategy="STRICT_SPREAD" if apart > 1 else "PACK")
            self._reserved.append(ReservedBundles(name=group.name, placement_group=reserved, bundles=bundles))
            if not reserved.wait(timeout_seconds=self._placement_timeout_s):
                raise self._reserved[-1].missing(self._placement_timeout_s)
            slots += [
                WorkerSlot(placement_group=reserved, bundle=i, num_cpus=one["CPU"], num_gpus=one.get("GPU", 0.0))
                for i, one in enumerate(bundles)
            ]
        return slots

    def _bundle(self, num_devices: int, share: float) -> dict[str, float]:
        if self.device == "cuda":
            return {"GPU": num_devices, "CPU": num_devices}
        return {"CPU": floor(share * num_devices * 100) / 100}

    def _slots(self, group: DeviceGroup, bundles: Sequence[WorkerSlot]) -> dict[Role, list[WorkerSlot]]:
        """The slots of each role of a device group: of each rank, and of each part of each engine. Roles other than
        rollout share theirs."""
        processes = group.num_processes_per_device
        per_node = group.shape.num_devices_per_node

        def slot(bundle: int, num_devices: int) -> WorkerSlot:
            share = num_devices / per_node / processes
            return replace(
                bundles[bundle],
                num_cpus=floor(bundles[bundle].num_cpus * share * 1000) / 1000,
                num_gpus=num_devices if self.device == "cuda" else 0.0,
            )

        ranks = [slot(rank // per_node, 1) for rank in range(group.shape.num_devices)]
        slots: dict[Role, list[WorkerSlot]] = {role: ranks for role in group.roles if role != Role.ROLLOUT}
        if Role.ROLLOUT in group.roles:
            parts = [slot(ranks[0] // per_node, len(ranks)) for ranks in group.engine_parts]
            # Ray gives two halves of one GPU to two ranks before it gives one half each to a rank and an engine.
            # Therefore ranks get whole GPUs from Ray, and colocated engines get the ids of these GPUs at their start.
            shared = group.is_shared_by_engines
            slots[Role.ROLLOUT] = [replace(part, num_gpus=0.0) if shared else part for part in parts]
        return slots
