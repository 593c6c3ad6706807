"""Opens a rollout engine: vLLM or plain transformers."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Protocol

from rlhf.config.rollout import ENGINES, RolloutSection, engines_that
from rlhf.engines.base import RolloutEngine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.base import WeightReceiver
from rlhf.errors import ConfigError
from rlhf.importing import importing


class ServingEngine(RolloutEngine, WeightReceiver, Protocol):
    """A rollout engine as its worker uses it: it samples, and it receives weights."""

    def reset(self) -> None:
        """Abort all requests, because the driver that sent them is gone; the next one sends weights before requests.
        Raises RlhfError unless the engine is serving a complete version."""
        ...

    def wake_weights(self) -> None:
        """Of an engine in sleep mode, take back the memory of the weights alone, so that a weight sync can bring new
        ones. It serves nothing before `wake`."""
        ...

    def peak_memory(self) -> int:
        """Peak bytes of the engine's largest process: of GPU memory, or of host memory where there is no GPU."""
        ...


def engine_kind(section: RolloutSection) -> str:
    """The name of an entry of ENGINES; auto is the first one that is installed."""
    if section.engine != "auto":
        return section.engine
    return next(kind for kind in ENGINES if find_spec(kind))


def require_engine(
    section: RolloutSection, *, mixture: bool = False, adapters: bool = False, on_gpu: bool = False
) -> None:
    """Raise ConfigError where the engine that `section` means cannot do what is asked of it."""
    kind = engine_kind(section)
    traits = ENGINES[kind]
    if mixture and not traits.mixes:
        others = " or ".join(engines_that(lambda engine: engine.mixes))
        raise ConfigError(
            f"rollout.engine: {kind} samples from one model and cannot mix a reference's logits with the policy's. "
            f"Set rollout.engine to {others}."
        )
    if adapters and not traits.max_adapter_rank:
        others = " or ".join(engines_that(lambda engine: engine.max_adapter_rank))
        raise ConfigError(
            f"rollout.sync_adapters: the {kind} engine takes merged weights only. Set it to false, or use {others}."
        )
    if section.router_replay and not traits.records_experts:
        others = " or ".join(engines_that(lambda engine: engine.records_experts))
        raise ConfigError(
            f"rollout.router_replay: the {kind} engine does not record which experts it uses. Set it to false, or use "
            f"{others}."
        )
    if on_gpu and not traits.on_gpu:
        others = " or ".join(engines_that(lambda engine: engine.on_gpu))
        raise ConfigError(f"rollout.engine: {kind} trains on CPU only. Install {others} and use it on GPUs.")


def open_engine(spec: EngineSpec, *, name: str) -> ServingEngine:
    """Load `spec.model` into the kind of engine that the section asks for; `name` is the engine's name in errors.

    The engine's own library is imported here, and the other ones are not. Raises ConfigError where that engine cannot
    mix a reference's logits with the policy's, or cannot add adapters.
    """
    require_engine(spec.section, mixture=spec.reference is not None, adapters=spec.adapter_rank > 0)
    return OPENERS[engine_kind(spec.section)](spec, name)


def _vllm(spec: EngineSpec, name: str) -> ServingEngine:
    from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415

    return VllmRolloutEngine(spec, name=name)


def _transformers(spec: EngineSpec, name: str) -> ServingEngine:
    with importing():
        from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine  # noqa: PLC0415

    return TransformersRolloutEngine(spec, name=name)


OPENERS: Mapping[str, Callable[[EngineSpec, str], ServingEngine]] = {"vllm": _vllm, "transformers": _transformers}
