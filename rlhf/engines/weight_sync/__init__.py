"""How the policy's weights reach the rollout engines: one file per medium."""

from rlhf.engines.weight_sync.base import EngineClient, WeightSender
from rlhf.engines.weight_sync.source import WeightSource


def make_sender(  # noqa: PLR0913
    backend: str,
    source: WeightSource,
    client: EngineClient,
    *,
    rank: int,
    world_size: int,
    master_address: str,
    port: int,
    num_receivers: int,
    bucket_bytes: int,
    timeout_s: float,
) -> WeightSender:
    """Build the sender of one trainer rank and join the engines to it; call it on every rank of the trainer.

    `backend` is gloo, nccl or ipc. `master_address` and `port` are where rank 0 can be reached by the engines (port 0
    takes a free one). `num_receivers` counts receiving processes: engines times their tensor parallel size. Raises
    WeightSyncError on rank 0 when an engine does not join within `timeout_s`; build a new sender to try again.
    """
    raise NotImplementedError
