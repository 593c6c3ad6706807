"""Weight sync over NCCL, for engines on their own GPUs: vLLM's packed broadcast from trainer rank 0."""

import socket
from functools import partial

from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from rlhf.engines.weight_sync.base import EngineClient
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.engines.weight_sync.vllm_sender import DigestingSource, VllmClient, VllmSender, open_with_deadline


def open_nccl(
    source: WeightSource,
    client: EngineClient,
    *,
    rank: int,
    master_address: str,
    port: int,
    num_receivers: int,
    bucket_bytes: int,
    timeout_s: float,
) -> VllmSender:
    """Create a communicator of rank 0 and all receiving processes; the other trainer ranks only gather.

    Raises:
        WeightSyncError: engines did not join in time.
    """
    digesting = DigestingSource(source, bucket_bytes, is_sender=rank == 0)
    vllm_client = VllmClient(client, digesting, num_receivers, timeout_s)
    init_info = NCCLTrainerInitInfo(
        master_address=master_address,
        master_port=port or _free_port(),
        world_size=1 + num_receivers,
        packed=True,
        packed_buffer_size_bytes=max(bucket_bytes, digesting.largest_parameter_bytes),
        rank=rank,
    )
    start = partial(NCCLTrainerWeightTransferEngine.trainer_init, init_info, client=vllm_client, source=digesting)
    engine = open_with_deadline(start, vllm_client, timeout_s)
    return VllmSender(engine, vllm_client, digesting, timeout_s)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
