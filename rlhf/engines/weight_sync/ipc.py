"""Weight sync over CUDA IPC, for engines that are colocated with trainer ranks: a buffer that both processes can read.

Each engine process reads the buffer of the trainer rank on its own GPU, so every trainer rank gathers all weights. Each
filled buffer is announced by a remote call, so the number of calls grows with the bytes of the model, not with the
number of its parameters.
"""

from functools import partial

from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

from rlhf.engines.weight_sync.base import EngineClient
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.engines.weight_sync.vllm_sender import DigestingSource, VllmClient, VllmSender, open_with_deadline


def open_ipc(
    source: WeightSource,
    client: EngineClient,
    *,
    rank: int,
    num_receivers: int,
    bucket_bytes: int,
    timeout_s: float,
) -> VllmSender:
    """Send the engines the layout of the buffers; there is no group to join. Raises WeightSyncError if one does not
    reply in time."""
    digesting = DigestingSource(source, bucket_bytes, is_sender=rank == 0)
    vllm_client = VllmClient(client, digesting, num_receivers, timeout_s)
    buffer_bytes = max(bucket_bytes, digesting.largest_parameter_bytes)
    init_info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=buffer_bytes, rank=rank)
    start = partial(IPCTrainerWeightTransferEngine.trainer_init, init_info, client=vllm_client, source=digesting)
    engine = open_with_deadline(start, vllm_client, timeout_s)
    return VllmSender(engine, vllm_client, digesting, timeout_s)
