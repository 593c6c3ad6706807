"""From a config to who plays in the run: which models are started, on how many devices, and what each loads."""

from collections.abc import Mapping

from rlhf.actors.launch import Script
from rlhf.actors.placement import Placement, Shape, plan_placement
from rlhf.actors.workers import EngineSpec, ScorerSpec, TraineeSpec
from rlhf.algorithms.base import Needs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.config.reward import RemoteSource, StartedSource
from rlhf.config.rollout import RolloutSection
from rlhf.engines.rewards import head_of
from rlhf.engines.rollout import NO_MIXTURE, engine_kind
from rlhf.errors import ConfigError
from rlhf.types import Head, Role

REFERENCE_SIGNAL = "ref_log_probs"


def reward_model(config: TrainConfig) -> StartedSource | None:
    """The reward model among an online run's sources."""
    if not isinstance(config, OnlineConfig):
        return None
    models = [source for source in config.reward.all_sources if isinstance(source, StartedSource)]
    if len(models) > 1:
        raise ConfigError(f"reward.sources: one reward model at most (got {len(models)}); serve the others over HTTP.")
    return models[0] if models else None


def sections(config: TrainConfig, needs: Needs) -> dict[Role, ModelSection]:
    """The models that this run starts, by role; those that learn come first."""
    started = {role: config.models[role.value] for role in needs.trains}
    if REFERENCE_SIGNAL in needs.measures and needs.following is None:
        started[Role.REFERENCE] = config.models[Role.REFERENCE.value]
    if (source := reward_model(config)) is not None:
        started[Role.REWARD] = source
    return started


def place(config: TrainConfig, needs: Needs) -> Placement:
    """The device groups of the run. Raises ConfigError where merged roles do not fit together."""
    shapes = {
        role: Shape(num_nodes=section.num_nodes, num_devices_per_node=section.num_gpus_per_node)
        for role, section in sections(config, needs).items()
    }
    if not isinstance(config, OnlineConfig):
        return plan_placement(shapes, config.cluster.colocate)
    rollout = config.rollout
    shapes[Role.ROLLOUT] = Shape(num_nodes=rollout.num_engines, num_devices_per_node=rollout.tensor_parallel_size)
    return plan_placement(shapes, config.cluster.colocate, num_engines=rollout.num_engines)


def cast(
    config: TrainConfig,
    needs: Needs,
    placement: Placement,
    num_updates: Mapping[Role, int],
    device: str,
) -> Script:
    """What every actor loads. `num_updates` are the optimizer steps that each trained role will make."""
    online = isinstance(config, OnlineConfig)
    temperature = config.rollout.temperature if isinstance(config, OnlineConfig) else 1.0
    started = sections(config, needs)
    trainees = {
        role: TraineeSpec(
            section=trained(started[role]),
            model=model_of(started[role], role),
            head=head,
            algorithm=config.algo,
            temperature=temperature,
            num_steps=num_updates[role],
            seed=config.run.seed,
        )
        for role, head in needs.trains.items()
    }
    scorers = {
        role: ScorerSpec(
            section=section,
            model=model_of(section, role),
            head=head_of(section) if isinstance(section, StartedSource) else Head.LOG_PROBS,
            temperature=temperature,
            seed=config.run.seed,
        )
        for role, section in started.items()
        if role not in needs.trains
    }
    if not online:
        return Script(trainees=trainees, scorers=scorers)
    assert isinstance(config, OnlineConfig)
    return Script(
        trainees=trainees,
        scorers=scorers,
        engine=EngineSpec(
            section=config.rollout,
            model=model_of(config.policy, Role.POLICY),
            dtype=dtype_of(config.policy, device),
            device=device,
            seed=config.run.seed,
            sync_backend=sync_backend(config.rollout, placement, device),
            reference=mixed_reference(config, needs),
        ),
        rewards={source.label: source for source in config.reward.all_sources if isinstance(source, RemoteSource)},
    )


def mixed_reference(config: OnlineConfig, needs: Needs) -> str | None:
    """The model that the rollout engines hold beside the policy; None where they sample from the policy alone."""
    if not needs.mixture:
        return None
    if engine_kind(config.rollout) != "transformers":
        raise ConfigError(NO_MIXTURE)
    return model_of(config.reference, Role.REFERENCE)


def dtype_of(section: ModelSection, device: str) -> str:
    """auto is float32 on CPU and bfloat16 on GPUs."""
    if section.dtype != "auto":
        return section.dtype
    return "float32" if device == "cpu" else "bfloat16"


def sync_backend(section: RolloutSection, placement: Placement, device: str) -> str:
    """auto is gloo on CPU, CUDA IPC where engines share the policy's GPUs, else NCCL."""
    if device != "cpu" and engine_kind(section) == "transformers":
        raise ConfigError("rollout.engine: transformers trains on CPU only. Install vllm and use it on GPUs.")
    if section.sync_backend != "auto":
        return section.sync_backend
    if device == "cpu":
        return "gloo"
    return "ipc" if Role.ROLLOUT in placement.group_of(Role.POLICY).roles else "nccl"


def trained(section: ModelSection) -> TrainedModelSection:
    """The section of a role that learns."""
    assert isinstance(section, TrainedModelSection), section
    return section


def model_of(section: ModelSection, role: Role) -> str:
    """The model that a role loads."""
    if section.model is None:
        raise ConfigError(f"{role}.model: not given.")
    return section.model
