"""vLLM's side of a weight sync: our engines for its weight-transfer factory, and the repair of tied heads on CPU.

vLLM loads this module through its `vllm.general_plugins` entry point, in every process that it starts, so `register`
imports nothing heavy. A rollout engine selects one of the names in `BACKENDS`.
"""

BACKENDS = {"gloo": "rlhf_gloo", "nccl": "rlhf_nccl", "ipc": "rlhf_ipc"}
"""Our medium -> the name under which vLLM's factory knows its receiving engine."""


def register() -> None:
    """Make our receiving engines known to vLLM. May be called many times."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    module = "rlhf.engines.weight_sync.vllm_receivers"
    classes = {"gloo": "GlooWeightTransferEngine", "nccl": "NcclWeightTransferEngine", "ipc": "IpcWeightTransferEngine"}
    for medium, name in BACKENDS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, classes[medium])
