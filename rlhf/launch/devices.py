"""Whether a run that starts its own Ray finds as many devices on this machine as it asks for."""

import os

from rlhf.algorithms.needs import Needs
from rlhf.config.commands import TrainConfig
from rlhf.errors import ConfigError
from rlhf.launch.local_gpus import usable_gpus
from rlhf.launch.services import starts_ray_here
from rlhf.planning.layout import too_few_nodes
from rlhf.planning.placement import shortages
from rlhf.planning.roles import place
from rlhf.terminal import counted


def require_devices(config: TrainConfig, needs: Needs) -> None:
    """Raise ConfigError where roles cannot be placed, or where this machine, if the run stays on it, is not enough: for
    what is spread over nodes, or for the GPUs. Without a GPU any number of processes shares the CPU's cores."""
    placement = place(config, needs)
    if not starts_ray_here(config, os.environ):
        return
    if problems := too_few_nodes(placement, 1):
        raise ConfigError(
            [f"{problem} This run has this machine alone: join a cluster with cluster.address." for problem in problems]
        )
    if config.cluster.device == "cpu":
        return
    gpus = usable_gpus()
    if not gpus and config.cluster.device == "cuda":
        raise ConfigError(
            "cluster.device: cuda, but this machine has no GPU that can be used. Set it to cpu, or join a "
            "cluster with cluster.address."
        )
    if gpus and (problems := shortages(placement, [float(len(gpus))])):
        kinds = ", ".join(sorted(set(gpus)))
        raise ConfigError([f"{problem.rstrip()} This machine has {len(gpus)} ({kinds})." for problem in problems])


def describe_devices(config: TrainConfig, needs: Needs) -> str:
    """What a run would use, as a few words."""
    num_devices = place(config, needs).num_devices
    if not starts_ray_here(config, os.environ):
        return f"{counted(num_devices, 'device')} of a cluster"
    gpus = [] if config.cluster.device == "cpu" else usable_gpus()
    if not gpus:
        return f"{counted(num_devices, 'process')} on the CPU"
    return f"{num_devices} of {counted(len(gpus), 'GPU')} ({', '.join(sorted(set(gpus)))})"
