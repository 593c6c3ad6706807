"""Opens a rollout engine: vLLM or plain transformers."""

from importlib.util import find_spec
from typing import Protocol

from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import RolloutEngine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.base import WeightReceiver
from rlhf.errors import ConfigError
from rlhf.importing import importing

NO_MIXTURE = (
    "rollout.engine: vLLM samples from one model and cannot mix a reference's logits with the policy's. "
    "Set rollout.engine to transformers."
)

NO_ADAPTERS = "rollout.sync_adapters: the transformers engine takes merged weights only. Set it to false, or use vllm."


class ServingEngine(RolloutEngine, WeightReceiver, Protocol):
    """A rollout engine as its worker uses it: it samples, and it receives weights."""

    def reset(self) -> None:
        """Abort all requests, because the driver that sent them is gone; the next one sends weights before requests.
        Raises RlhfError unless the engine is serving a complete version."""
        ...

    def peak_memory(self) -> int:
        """Peak bytes of the engine's largest process: of GPU memory, or of host memory where there is no GPU."""
        ...


def engine_kind(section: RolloutSection) -> str:
    """vllm or transformers; auto is vLLM if it is installed, else transformers."""
    if section.engine != "auto":
        return section.engine
    return "vllm" if find_spec("vllm") else "transformers"


def open_engine(spec: EngineSpec, *, name: str) -> ServingEngine:
    """Load `spec.model` into the kind of engine that the section asks for; `name` is the engine's name in errors.

    The engine's own library is imported here, and the other one is not. Raises ConfigError where that engine cannot
    mix a reference's logits with the policy's, or cannot add adapters.
    """
    if engine_kind(spec.section) == "vllm":
        if spec.reference is not None:
            raise ConfigError(NO_MIXTURE)
        from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415

        return VllmRolloutEngine(spec, name=name)
    if spec.adapter_rank:
        raise ConfigError(NO_ADAPTERS)
    with importing():
        from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine  # noqa: PLC0415

    return TransformersRolloutEngine(spec, name=name)
