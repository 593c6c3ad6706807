"""Rollout engines that are spread over nodes: one worker on each. The first one is the engine, and is called; the
others, its parts, hold the processes that compute on their nodes, as those of the first one tell them."""

# ruff: noqa: PLC0415

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from rlhf.actors import environment
from rlhf.actors.actor import node_address
from rlhf.actors.calls import Worker
from rlhf.actors.rendezvous import RendezvousActor
from rlhf.engines.process.memory_errors import naming_memory_errors
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.importing import importing

if TYPE_CHECKING:
    from rlhf.engines.rollout.vllm_part import VllmPart

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
CLOSE_TIMEOUT_S = 30.0


class EngineActor(RendezvousActor):
    """A worker with the processes of a rollout engine on one node."""

    def _prepare(self, spec: EngineSpec, gpus: Sequence[str]) -> None:
        """Set up this process before the engine's library is imported. It computes on `gpus`; if empty, on the GPUs
        that Ray assigned to it."""
        from rlhf.engines.process.rendezvous import bind_collectives

        if spec.device == "cuda":
            self.see_gpus(gpus or self.gpus())
            environment.drop_expandable_segments(os.environ)
        bind_collectives(node_address())


class RolloutPart(EngineActor):
    """What an engine has on a node other than its first one."""

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._part: VllmPart | None = None
        self._closed = threading.Event()

    def start(self, spec: EngineSpec, name: str, gpus: Sequence[str]) -> None:
        """Load this node's share of the model. Waits for the processes of the other nodes, which load theirs."""
        self._prepare(spec, gpus)
        with importing():
            from rlhf.engines.rollout.vllm_environment import set_environment

            set_environment(spec)
            from rlhf.engines.rollout.vllm_part import VllmPart

        with naming_memory_errors(name, "engine"):
            self._part = VllmPart(spec)
        threading.Thread(target=self._end_with_part, args=(self._part, name), name=f"{name}-watch", daemon=True).start()

    def closed(self) -> None:
        """Wait until `close` is called: for the engine, which learns by this call if this worker is lost."""
        self._closed.wait()

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
        self._closed.set()

    def _end_with_part(self, part: "VllmPart", name: str) -> None:
        """End this process if one of the part's ends before `close`: the engine cannot go on without it."""
        if not part.wait():
            logger.error("%s: a process of vLLM has ended", name)
            os._exit(1)


class PartWatch:
    """Ends this process, the first one of an engine, when one of its parts on other nodes is lost: what the engine is
    asked would wait for it forever.

    Waits for: the ends of the calls of `RolloutPart.closed`, in a thread of its own. Unblocked by: these, or `close`.
    """

    def __init__(self, name: str, parts: Sequence[Worker]) -> None:
        self._name = name
        self._parts = {part.handle.closed.remote(): part for part in parts}
        self._closing = threading.Event()
        threading.Thread(target=self._run, name=f"{name}-parts", daemon=True).start()

    def close(self) -> None:
        """Close the parts. Raises: as `ray.get`."""
        self._closing.set()
        ray.get([part.handle.close.remote() for part in self._parts.values()], timeout=CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        ended: list[ray.ObjectRef[None]] = []
        while not ended:
            ended, _ = ray.wait(list(self._parts), num_returns=1, timeout=LOOK_EVERY_S)
            if self._closing.is_set():
                return
        logger.error("%s: %s was lost", self._name, self._parts[ended[0]])
        os._exit(1)
