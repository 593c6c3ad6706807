"""What the size of a run's models asks of its start: the time to load them, and a device that was meant."""

from rlhf.algorithms.needs import Needs
from rlhf.config.commands import TrainConfig
from rlhf.errors import ConfigError, ModelError
from rlhf.planning.roles import local_config_json, shapes_of
from rlhf.types import Role

LARGEST_ON_CPU_BY_DEFAULT = 2e9
"""Parameters of the largest model that is trained on CPUs without being told to."""
LOADED_PER_SECOND = 100e6
"""Bytes of weights that a start may be counted on to read, check and distribute in a second, from a shared disk."""
STORED_BYTES = 2
"""Bytes of a parameter in most checkpoints."""


def require_meant_device(config: TrainConfig, needs: Needs, device: str) -> None:
    """Refuse to train a large model on CPUs because `cluster.device` is auto and no GPU is there: nodes with GPUs may
    join a moment later.

    Raises:
        ConfigError: names the model and what to set.
    """
    if config.cluster.device != "auto" or device != "cpu":
        return
    for role, size in _sizes(config, needs).items():
        if role in needs.trains and size > LARGEST_ON_CPU_BY_DEFAULT:
            raise ConfigError(
                f"cluster.device: auto found no GPU in the cluster, and {role}.model has {size / 1e9:.1f} billion "
                "parameters. Set cuda where nodes with GPUs will join, or cpu to train it on CPUs."
            )


def loading_timeout_s(config: TrainConfig, needs: Needs) -> float:
    """Longest time for models to load: `cluster.start_timeout_s`, and what reading their weights takes one after the
    other, as it is for models that share processes."""
    stored = STORED_BYTES * sum(_sizes(config, needs).values())
    return config.cluster.start_timeout_s + stored / LOADED_PER_SECOND


def collective_timeout_s(config: TrainConfig, needs: Needs) -> float:
    """Longest time for one collective of a model's ranks: a phase of training, or the time to load models if that is
    longer. While rank 0 reads a model, the others wait for it in one."""
    return max(config.train.step_timeout_s, loading_timeout_s(config, needs))


def _sizes(config: TrainConfig, needs: Needs) -> dict[Role, int]:
    """Parameters of each model of the run; empty where a model's size is not known before it is loaded."""
    try:
        shapes = shapes_of(config, needs, local_config_json)
    except (ConfigError, ModelError):
        return {}
    return {role: shape.num_parameters for role, shape in shapes.items()}
