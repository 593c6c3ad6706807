"""The sender of each backend: gloo, NCCL, CUDA IPC."""

from rlhf.engines.weight_sync.base import EngineClient, WeightSender
from rlhf.engines.weight_sync.gloo import GatherOnlySender, GlooSender
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.errors import ConfigError


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
    """Build the sender of trainer rank `rank` of `world_size`; on rank 0, also have the engines join its group.

    Call it on every rank. `backend` is gloo, nccl or ipc. The engines reach rank 0 at `master_address` and `port` (0
    chooses a free port). `num_receivers` counts receiving processes: engines times their tensor parallel size. Raises
    WeightSyncError on rank 0 if an engine does not join within `timeout_s`; build a new sender to try again.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"weight sync: rank {rank} of {world_size} does not exist.")
    if backend == "gloo" and rank > 0:
        return GatherOnlySender(source, bucket_bytes=bucket_bytes, timeout_s=timeout_s)
    if backend == "gloo":
        return GlooSender(
            source,
            client,
            master_address=master_address,
            port=port,
            num_receivers=num_receivers,
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
        )
    # vLLM is imported for the GPU backends only.
    if backend == "nccl":
        from rlhf.engines.weight_sync.nccl import open_nccl  # noqa: PLC0415

        return open_nccl(
            source,
            client,
            rank=rank,
            master_address=master_address,
            port=port,
            num_receivers=num_receivers,
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
        )
    if backend == "ipc":
        from rlhf.engines.weight_sync.ipc import open_ipc  # noqa: PLC0415

        return open_ipc(
            source, client, rank=rank, num_receivers=num_receivers, bucket_bytes=bucket_bytes, timeout_s=timeout_s
        )
    raise ConfigError(f"rollout.sync_backend: unknown backend (got {backend}, need gloo, nccl or ipc).")
