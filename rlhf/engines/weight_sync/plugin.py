"""vLLM's side of a weight sync: our engines for its weight-transfer factory.

vLLM loads this module through its `vllm.general_plugins` entry point, in every process that it starts, so `register`
imports nothing heavy. A rollout engine selects one of the names in `BACKENDS`.
"""

from threading import RLock

BACKENDS = {"gloo": "rlhf_gloo", "nccl": "rlhf_nccl", "ipc": "rlhf_ipc"}
"""Our medium -> the name under which vLLM's factory knows its receiving engine."""
ADAPTER_BACKENDS = {"gloo": "rlhf_gloo_adapters", "nccl": "rlhf_nccl_adapters", "ipc": "rlhf_ipc_adapters"}
"""The same, of engines that receive adapters alone."""
ADAPTER_ID = 1
"""vLLM's number of the policy's adapters."""


def register() -> None:
    """Make our receiving engines known to vLLM. May be called many times."""
    from tqdm import tqdm  # noqa: PLC0415
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    tqdm.set_lock(RLock())  # its own spans processes: a semaphore that a killed one leaves in the file system
    package = "rlhf.engines.weight_sync"
    classes = {
        **{name: ("vllm_receivers", f"{medium.capitalize()}WeightTransferEngine") for medium, name in BACKENDS.items()},
        **{name: ("vllm_adapters", f"{medium.capitalize()}AdapterEngine") for medium, name in ADAPTER_BACKENDS.items()},
    }
    for name, (module, engine) in classes.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, f"{package}.{module}", engine)
