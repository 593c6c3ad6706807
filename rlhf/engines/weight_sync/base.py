"""What a weight sync is made of: a sender in the trainer, a receiver in each rollout engine, and a client between them.

Two planes. The *control plane* is the four calls of vLLM's weight transfer (init once; start, update, finish for each
sync); the trainer drives it through an `EngineClient`, and every `WeightReceiver` answers it. The *data plane* is the
medium (gloo, NCCL, CUDA IPC) that the bytes travel through while the engines are inside `update_weights`.

A sync moves a receiver through these states; it serves only in the last, and any failure leaves it in the second,
whence a later whole sync gets it out:

    serving --start--> updating (serves nothing) --update: all buckets verified--> whole --finish--> serving
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from rlhf.types import SyncReport

Info: TypeAlias = Mapping[str, object]
"""What a control-plane call carries; JSON values, except for CUDA IPC handles, which are picklable tuples."""

LOOKING_S = 20.0
"""Longest time that a client takes, past a call's deadline, to look after the processes of engines that are silent."""


class WeightReceiver(Protocol):
    """The receiving side of a sync: both rollout engines implement it. Errors are WeightSyncErrors that name the
    engine, the version and the bucket."""

    def init_weight_transfer(self, init_info: Info) -> None:
        """Join the transfer group that `init_info` describes, leaving any earlier one. Blocks until all have joined.

        The group stands until the next call. Raises WeightSyncError when the others do not come in time.
        """
        ...

    def start_weight_update(self) -> None:
        """Stop serving. Answers that are being generated are finished first: the trainer decides when to sync."""
        ...

    def update_weights(self, update_info: Info) -> None:
        """Receive every bucket of one version, verify each against the digest that came with it, load it."""
        ...

    def finish_weight_update(self, version: int, digest: str) -> str:
        """Serve `version` from now on, with an empty prefix cache, if `digest` is that of what was received.

        Returns the receiver's own digest, or raises WeightSyncError where it differs.
        """
        ...


class EngineClient(Protocol):
    """The trainer's stub for the control planes of all rollout engines.

    Each method calls all engines at the same time, waits for all of them, and raises WeightSyncError that names every
    engine which failed, died, or did not answer within `timeout_s`. Only the sending rank calls it, from two threads
    at most. One method call is one remote call for each engine.
    """

    @property
    def engine_names(self) -> tuple[str, ...]:
        """Names of the engines, in the order of `init_infos`."""
        ...

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        """Engine i is given `init_infos[i]`."""
        ...

    def start_weight_update(self, timeout_s: float) -> None: ...

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        """All engines are given the same; they return when they have received everything."""
        ...

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> dict[str, str]:
        """The digest that each engine computed over what it received, by engine name."""
        ...


class WeightSender(Protocol):
    """The sending side of a sync. Exists on every trainer rank: rank 0 sends, the others take part in its gathers."""

    def send(self, version: int) -> SyncReport:
        """Give every engine the source's weights as `version`; collective over the trainer's ranks.

        The report is whole on rank 0; on the other ranks its digest is empty. Raises WeightSyncError on rank 0 when
        an engine did not get, or refused, the weights: it then serves nothing until a later sync succeeds. The other
        ranks never hang because of an engine.
        """
        ...

    def close(self) -> None:
        """Leave the transfer group. The engines keep serving what they have."""
        ...
