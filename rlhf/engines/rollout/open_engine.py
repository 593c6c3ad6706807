"""Opening a rollout engine of either kind."""

from importlib.util import find_spec
from typing import Protocol

from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import RolloutEngine
from rlhf.engines.weight_sync.base import WeightReceiver
from rlhf.errors import ConfigError
from rlhf.importing import importing

NO_MIXTURE = (
    "rollout.engine: vLLM samples from one model and cannot mix a reference's logits with the policy's. "
    "Set rollout.engine to transformers."
)

NO_ADAPTERS = "rollout.sync_adapters: the transformers engine takes merged weights only. Set it to false, or use vllm."


class ServingEngine(RolloutEngine, WeightReceiver, Protocol):
    """Both faces of a rollout engine: it samples, and it takes weights."""

    def reset(self) -> None:
        """Forget what was asked, since who asked is gone; others will send weights before they ask. Raises RlhfError
        where the engine is not serving whole weights."""
        ...

    def peak_memory(self) -> int:
        """Bytes that the fullest of the engine's processes has held at most: of a GPU's memory, or without one of host
        memory."""
        ...


def engine_kind(section: RolloutSection) -> str:
    """auto is vLLM where it is installed, else transformers."""
    if section.engine != "auto":
        return section.engine
    return "vllm" if find_spec("vllm") else "transformers"


def open_engine(  # noqa: PLR0913
    section: RolloutSection,
    model: str,
    *,
    dtype: str,
    device: str,
    seed: int,
    name: str,
    sync_backend: str,
    reference: str | None = None,
    adapter_rank: int = 0,
) -> ServingEngine:
    """Load `model` (a folder or hub name) into the kind of engine that the section asks for.

    `dtype` is float32 or bfloat16, `device` cpu or cuda, `sync_backend` gloo, nccl or ipc. `reference` is the model
    whose logits are mixed with the policy's, where requests ask for that; `adapter_rank` is that of the adapters which
    weight syncs bring in the weights' stead, 0 for weights. The engine's own library is imported here, and the other
    one is not. Raises ConfigError where that engine cannot mix, or cannot add adapters.
    """
    if engine_kind(section) == "vllm":
        if reference is not None:
            raise ConfigError(NO_MIXTURE)
        from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415

        return VllmRolloutEngine(
            section,
            model,
            dtype=dtype,
            device=device,
            seed=seed,
            name=name,
            sync_backend=sync_backend,
            adapter_rank=adapter_rank,
        )
    if adapter_rank:
        raise ConfigError(NO_ADAPTERS)
    with importing():
        from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine  # noqa: PLC0415

    return TransformersRolloutEngine(section, model, dtype=dtype, device=device, name=name, reference=reference)
