"""Registers our receiving engines with vLLM's weight-transfer factory, and makes up for a missing torchvision.

vLLM loads this module through its `vllm.general_plugins` entry point, in every process that it starts, so `register`
imports nothing heavy. A rollout engine selects one of the names in `BACKENDS`.
"""

from threading import RLock

from rlhf.engines.process.empty_torchvision import provide_torchvision

BACKENDS = {"gloo": "rlhf_gloo", "nccl": "rlhf_nccl", "ipc": "rlhf_ipc"}
"""Our backend -> the name of its receiving engine in vLLM's factory."""
ADAPTER_BACKENDS = {"gloo": "rlhf_gloo_adapters", "nccl": "rlhf_nccl_adapters", "ipc": "rlhf_ipc_adapters"}
"""The same, for engines that receive LoRA adapters only."""
ADAPTER_ID = 1
"""The LoRA id of the policy's adapters in vLLM."""


def register() -> None:
    """Register our receiving engines with vLLM, and let it import models that read images. May be called repeatedly."""
    from tqdm import tqdm  # noqa: PLC0415
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    provide_torchvision()
    tqdm.set_lock(RLock())  # tqdm's default lock is a semaphore that a killed process leaves behind
    package = "rlhf.engines.weight_sync"
    classes = {
        **{name: ("vllm_receivers", f"{medium.capitalize()}WeightTransferEngine") for medium, name in BACKENDS.items()},
        **{name: ("vllm_adapters", f"{medium.capitalize()}AdapterEngine") for medium, name in ADAPTER_BACKENDS.items()},
    }
    for name, (module, engine) in classes.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, f"{package}.{module}", engine)
