"""The interfaces of a weight sync: a sender in the trainer, a receiver in each rollout engine, a client between them.

There are two planes. The *control plane* is the four calls of vLLM's weight transfer (init once; start, update and
finish for each sync): the trainer makes them through an `EngineClient`, and every `WeightReceiver` implements them. The
*data plane* is the backend (gloo, NCCL, CUDA IPC) that moves the bytes while the engines are inside `update_weights`.

A sync moves a receiver through these states. A receiver serves requests only in the state serving; after a failure it
serves nothing until a later sync completes:

    serving --start--> updating --update: all buckets verified--> complete --finish--> serving
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from rlhf.errors import WeightSyncError
from rlhf.types import SyncReport

Info: TypeAlias = Mapping[str, object]
"""The arguments of a control-plane call: JSON values, except for CUDA IPC handles, which are picklable tuples."""

HEALTH_CHECK_S = 20.0
"""The longest time after a call's timeout that a client needs to find out which engine processes are still alive."""


class WeightReceiver(Protocol):
    """The receiving side of a sync, which both rollout engines implement. Its WeightSyncErrors name the engine, the
    version and the bucket."""

    def init_weight_transfer(self, init_info: Info) -> None:
        """Join the process group that `init_info` describes, and leave any earlier one. Blocks until all have joined.

        The group is used until the next call. Raises WeightSyncError if the others do not join in time.
        """
        ...

    def start_weight_update(self) -> None:
        """Stop serving. Running requests are finished first, or paused: see the engine."""
        ...

    def update_weights(self, update_info: Info) -> None:
        """Receive every bucket of one version, verify its digest, and load it."""
        ...

    def finish_weight_update(self, version: int, digest: str) -> str:
        """Serve `version` from now on, with an empty prefix cache, if `digest` (the sender's) is that of what arrived.

        Returns the receiver's own digest; raises WeightSyncError if it differs.
        """
        ...


class EngineClient(Protocol):
    """The trainer's client for the control plane of all rollout engines.

    Each method calls all engines concurrently, waits for all of them, and raises WeightSyncError that names every
    engine that failed, died, or did not reply within `timeout_s`. Only the sending rank calls it, from at most two
    threads. One method call is one remote call to each engine.
    """

    @property
    def engine_names(self) -> tuple[str, ...]:
        """The engines' names, in the order of `init_infos`."""
        ...

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        """Engine i gets `init_infos[i]`."""
        ...

    def start_weight_update(self, timeout_s: float) -> None: ...

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        """All engines get the same arguments, and return when they have received everything."""
        ...

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> dict[str, str]:
        """The digest that each engine computed over what it received, by engine name."""
        ...


class WeightSender(Protocol):
    """The sending side of a sync. It exists on every trainer rank: rank 0 sends, the others take part in gathers."""

    def send(self, version: int) -> SyncReport:
        """Send the source's weights to every engine as `version`; collective over the trainer's ranks.

        The report is complete on rank 0; on other ranks its digest is empty. Raises WeightSyncError on rank 0 if an
        engine did not receive the weights or could not load them: it then serves nothing until a later sync succeeds.
        The other ranks never hang because of an engine.
        """
        ...

    def close(self) -> None:
        """Leave the process group. The engines keep serving the weights that they have."""
        ...


def require_equal_digests(version: int, digest: str, received: Mapping[str, str]) -> None:
    """Raise WeightSyncError that names the engines, by name in `received`, whose digest is another than `digest`."""
    wrong = [
        f"engine {name}: version {version}: digest {own}, need {digest}"
        for name, own in received.items()
        if own != digest
    ]
    if wrong:
        raise WeightSyncError("\n".join(wrong))
