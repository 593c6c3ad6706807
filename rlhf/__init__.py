"""Train language models from feedback on a Ray cluster.

    import rlhf

    config = rlhf.load_config("grpo", "configs/grpo.yaml", {"train.num_steps": 100})
    result = rlhf.train(config)
    print(rlhf.generate(result.model, ["What is 2 + 2?"]))

The names below are the public API. They are imported when first used: `import rlhf` itself is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.algorithms.base import Algorithm
    from rlhf.environments.agent import AgentSession
    from rlhf.environments.environment import Result
    from rlhf.errors import RlhfError
    from rlhf.launch.api import Generation, Reward, check, generate, load_config, train
    from rlhf.launch.train import TrainResult
    from rlhf.reward_log import log

__version__ = "0.1.0"
__all__ = [
    "AgentSession",
    "Algorithm",
    "Generation",
    "Result",
    "Reward",
    "RlhfError",
    "TrainResult",
    "__version__",
    "check",
    "generate",
    "load_config",
    "log",
    "train",
]

_MODULES = {
    "AgentSession": "rlhf.environments.agent",
    "Algorithm": "rlhf.algorithms.base",
    "Result": "rlhf.environments.environment",
    "RlhfError": "rlhf.errors",
    "TrainResult": "rlhf.launch.train",
    "log": "rlhf.reward_log",
    **dict.fromkeys(("Generation", "Reward", "check", "generate", "load_config", "train"), "rlhf.launch.api"),
}
"""Where each public name is defined."""


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    value: object = vars(import_module(_MODULES[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
