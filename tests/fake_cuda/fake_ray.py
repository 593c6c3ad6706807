"""Ray's scheduler and actors: bundles on nodes, GPUs by their ids, calls in order. Arguments are pickled, as by Ray."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlhf.actors import post_mortem
from rlhf.actors.calls import Worker
from tests.fake_cuda.machine import Node, Process, current, inside

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


@dataclass(eq=False)
class Bundles:
    """A placement group: the node of each bundle, and the GPUs that no actor has yet."""

    nodes: Sequence[Node]
    free: list[list[int]]

    def wait(self, timeout_seconds: float) -> bool:
        del timeout_seconds
        return True


class Ref:
    """The result of a call."""

    def __init__(self, future: "Future[object]", method: str) -> None:
        self.future = future
        self.method = method


class Handle:
    """An actor's handle."""

    known: ClassVar[dict[int, "Handle"]] = {}

    def __init__(self, actor: "Actor") -> None:
        self._actor = actor
        Handle.known[id(actor)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return handle_of, (id(self._actor),)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *args, **kwargs: self._actor.call(name, args, kwargs))


def handle_of(actor: int) -> Handle:
    """The handle of an actor, by its id."""
    return Handle.known[actor]


@dataclass(eq=False)
class Actor:
    """An object in a process of its own, with as many threads as calls that it runs at the same time."""

    process: Process
    gpus: Sequence[int]
    threads: ThreadPoolExecutor
    instance: object = None

    def call(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Ref:
        sent = cloudpickle.dumps((args, kwargs))
        if not self.process.is_alive:
            gone: Future[object] = Future()
            gone.set_exception(RayActorError(error_msg="The actor is dead."))
            return Ref(gone, name)
        return Ref(self.threads.submit(self._run, name, sent), name)

    def _run(self, name: str, sent: bytes) -> object:
        with inside(self.process):
            args, kwargs = cloudpickle.loads(sent)
            result = getattr(self.instance, name)(*args, **kwargs)
        return cloudpickle.loads(cloudpickle.dumps(result))


@dataclass
class FakeRay:
    """The scheduler of a cluster."""

    nodes: Sequence[Node]
    actors: list[Actor] = field(default_factory=list)
    free: dict[Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = {node: node.num_gpus for node in self.nodes}
        self._ids = {node: itertools.count() for node in self.nodes}
        self._lock = threading.Lock()

    def placement_group(self, bundles: Sequence[Mapping[str, float]], strategy: str) -> Bundles:
        """PACK fills nodes; STRICT_SPREAD gives each bundle a node of its own. Raises where there is no room."""
        chosen: list[Node] = []
        for bundle in bundles:
            need = int(bundle["GPU"])
            room = [n for n in self.nodes if self.free[n] >= need and not (strategy == "STRICT_SPREAD" and n in chosen)]
            if not room:
                raise AssertionError(f"no node has {need} free GPUs: {self.free}")
            node = min(room, key=lambda n: self.free[n])
            self.free[node] -= need
            chosen.append(node)
        ids = [[next(self._ids[node]) for _ in range(int(b["GPU"]))] for node, b in zip(chosen, bundles, strict=True)]
        return Bundles(chosen, ids)

    def remote(self, kind: type) -> Any:
        """`ray.remote(kind)`, whose options must be given."""
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *args: self._start(kind, options, args))
        )

    def _start(self, kind: type, options: Mapping[str, Any], args: Sequence[object]) -> Handle:
        strategy = options.get("scheduling_strategy")
        node, gpus = self.nodes[0], list[int]()
        if strategy is not None:
            bundles, index = strategy.placement_group, strategy.placement_group_bundle_index
            with self._lock:
                node, free = bundles.nodes[index], bundles.free[index]
                gpus = [free.pop(0) for _ in range(int(options["num_gpus"]))]
        environ = dict(node.environ) | dict(options.get("runtime_env", {}).get("env_vars", {}))
        if gpus and NOSET not in environ:  # Ray leaves the variable alone for actors without GPUs
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        process = Process(node, environ, str(options["name"]))
        actor = Actor(process, gpus, ThreadPoolExecutor(options["max_concurrency"], thread_name_prefix=process.name))
        self.actors.append(actor)

        def construct() -> None:
            with inside(process):
                actor.instance = kind(*args)

        actor.threads.submit(construct).result()
        return Handle(actor)

    def kill(self, handle: Handle) -> None:
        handle._actor.process.end()
        handle._actor.threads.shutdown(wait=False, cancel_futures=True)

    def runtime_context(self) -> Any:
        process = current()
        node = self.nodes[0] if process is None else process.node
        actor = next((one for one in self.actors if one.process is process), None)
        ids = [] if actor is None else [str(gpu) for gpu in actor.gpus]
        return SimpleNamespace(get_node_id=lambda: node.name, get_accelerator_ids=lambda: {"GPU": ids})

    def list_nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": node.name,
                "NodeManagerAddress": node.address,
                "Alive": True,
                "Resources": {"GPU": float(node.num_gpus), "CPU": 64.0, "accelerator_type:H100": 1.0},
            }
            for node in self.nodes
        ]


def wait_for(refs: Sequence[Ref], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
    """As `ray.wait`."""
    until = FIRST_COMPLETED if num_returns == 1 else ALL_COMPLETED
    done = wait([ref.future for ref in refs], timeout=timeout, return_when=until).done
    ready = [ref for ref in refs if ref.future in done][:num_returns]
    return ready, [ref for ref in refs if ref not in ready]


def get(refs: Any, *, timeout: float | None = None) -> Any:
    """As `ray.get`."""
    if isinstance(refs, list):
        return [get(ref, timeout=timeout) for ref in refs]
    try:
        return refs.future.result(timeout)
    except TimeoutError:
        if refs.future.done():
            raise
        raise GetTimeoutError from None
    except RayActorError:
        raise
    except Exception as error:
        raise RayTaskError(refs.method, repr(error), error) from error


class UnwatchedParts:
    """In place of `PartWatch`, whose thread would outlive these fakes, and then ask Ray itself."""

    def __init__(self, _name: str, parts: Sequence[Worker]) -> None:
        self._parts = parts

    def close(self) -> None:
        for part in self._parts:
            part.handle.close.remote()


def install(patch: pytest.MonkeyPatch, fake: FakeRay) -> None:
    """Take Ray's place."""
    for name, answer in (
        ("remote", fake.remote),
        ("kill", fake.kill),
        ("wait", wait_for),
        ("get", get),
        ("nodes", fake.list_nodes),
        ("get_runtime_context", fake.runtime_context),
        ("shutdown", lambda: None),
    ):
        patch.setattr(ray, name, answer)
    patch.setattr("rlhf.actors.cluster.connect", lambda *_args, **_kwargs: SimpleNamespace(close=lambda: None))
    patch.setattr("rlhf.actors.cluster.placement_group", fake.placement_group)
    patch.setattr("rlhf.actors.cluster.remove_placement_group", lambda _group: None)
    patch.setattr("rlhf.actors.cluster.placement_group_table", lambda _group: {"state": "CREATED"})
    patch.setattr("rlhf.actors.rollout_workers.PartWatch", UnwatchedParts)
    # Every process is this one: nobody may look at it, or send it signals.
    patch.setattr(post_mortem, "examine", lambda _processes: {})
    patch.setattr(post_mortem, "kill", lambda _processes: {})
    patch.setattr(post_mortem, "find_stopped", lambda _processes: set())
