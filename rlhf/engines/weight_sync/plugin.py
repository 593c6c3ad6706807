"""Registers our receiving engines with vLLM's weight-transfer factory, and makes up for a missing torchvision.

vLLM loads this module through its `vllm.general_plugins` entry point, in every process that it starts, so `register`
imports nothing heavy. A rollout engine selects one of the names in `BACKENDS`.
"""

import multiprocessing
import os
from threading import RLock, Thread

from rlhf.engines.process.empty_torchvision import provide_torchvision

BACKENDS = {"gloo": "rlhf_gloo", "nccl": "rlhf_nccl", "ipc": "rlhf_ipc"}
"""Our backend -> the name of its receiving engine in vLLM's factory."""
ADAPTER_BACKENDS = {"gloo": "rlhf_gloo_adapters", "nccl": "rlhf_nccl_adapters", "ipc": "rlhf_ipc_adapters"}
"""The same, for engines that receive LoRA adapters only."""
ENDS_WITH_PARENT = "RLHF_ENDS_WITH_PARENT"
"""Environment variable that makes vLLM's processes end when the one ends that started them."""
ADAPTER_ID = 1
"""The LoRA id of the policy's adapters in vLLM."""


def register() -> None:
    """Register our receiving engines with vLLM, and let it import models that read images. May be called repeatedly."""
    from tqdm import tqdm  # noqa: PLC0415
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    end_with_parent()
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


def end_with_parent() -> None:
    """If `ENDS_WITH_PARENT` is set, and Python's `multiprocessing` started this process: end it when the process that
    started it ends, in whatever way."""
    parent = multiprocessing.parent_process()
    if ENDS_WITH_PARENT not in os.environ or parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, name="end-with-parent", daemon=True).start()
