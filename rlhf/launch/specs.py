"""From a config to what every worker loads."""

from collections.abc import Mapping

from rlhf.actors.environment_workers import EnvironmentsSpec
from rlhf.actors.launch_spec import LaunchSpec
from rlhf.algorithms.needs import Needs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.models import ModelSection, TrainedModelSection, dtype_on
from rlhf.config.reward import RemoteSource, StartedSource
from rlhf.config.rollout import RolloutSection
from rlhf.config.rules.placement import GLOO_ON_GPUS, unfit_for_cpus
from rlhf.engines.rewards import head_of
from rlhf.engines.rollout.open_engine import require_engine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.errors import ConfigError
from rlhf.launch.agents import world_spec
from rlhf.planning.placement import Placement
from rlhf.planning.roles import model_of, sections
from rlhf.types import Head, Role


def make_launch_spec(
    config: TrainConfig,
    needs: Needs,
    placement: Placement,
    num_updates: Mapping[Role, int],
    device: str,
) -> LaunchSpec:
    """What every worker loads. `num_updates` are the optimizer steps that each trained role will make."""
    temperature = config.rollout.temperature if isinstance(config, OnlineConfig) else 1.0
    started = sections(config, needs)
    trained = {
        role: TrainedModelSpec(
            section=trained_section(started[role]),
            model=model_of(started[role], role),
            head=head,
            algorithm=config.algo,
            temperature=temperature,
            num_steps=num_updates[role],
            seed=config.run.seed,
            replays_routers=role is Role.POLICY and isinstance(config, OnlineConfig) and config.rollout.router_replay,
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
    if not isinstance(config, OnlineConfig):
        return LaunchSpec(trained=trained, scorers=scorers)
    return LaunchSpec(
        trained=trained,
        scorers=scorers,
        engine=make_engine_spec(
            config.policy, config.rollout, placement, device, config.run.seed, mixed_reference(config, needs)
        ),
        rewards={source.label: source for source in config.reward.all_sources if isinstance(source, RemoteSource)},
        reward_concurrency=config.reward.concurrency,
        environments=environments_spec(config.rollout),
    )


def make_engine_spec(
    policy: TrainedModelSection,
    rollout: RolloutSection,
    placement: Placement,
    device: str,
    seed: int,
    reference: str | None = None,
) -> EngineSpec:
    """What a rollout engine loads, and how the policy's weights reach it. Raises ConfigError if they cannot, or if the
    engine cannot be spread as it is to be."""
    if device == "cpu" and (unfit := unfit_for_cpus(rollout)) is not None:
        raise ConfigError(f"rollout.{': '.join(unfit)}")
    return EngineSpec(
        section=rollout,
        model=model_of(policy, Role.POLICY),
        dtype=dtype_on(policy.dtype, device),
        device=device,
        seed=seed,
        sync_backend=sync_backend(rollout, placement, device),
        reference=reference,
        adapter_rank=synced_adapters(policy, rollout),
    )


def environments_spec(section: RolloutSection) -> EnvironmentsSpec | None:
    """What workers of tools and environments load; None where these run on the driver's node."""
    if not section.has_episodes or not section.environment_workers:
        return None
    return EnvironmentsSpec(
        world=world_spec(section),
        num_workers=section.environment_workers,
        num_processes=section.environment_processes,
        timeout_s=section.environment_timeout_s,
    )


def mixed_reference(config: OnlineConfig, needs: Needs) -> str | None:
    """The reference model that the rollout engines load in addition to the policy; None if they sample from the policy
    only."""
    if not needs.mixture:
        return None
    require_engine(config.rollout, mixture=True)
    return model_of(config.reference, Role.REFERENCE)


def synced_adapters(policy: TrainedModelSection, rollout: RolloutSection) -> int:
    """Rank of the LoRA adapters that are sent to the engines instead of merged weights; 0 if weights are sent."""
    if not rollout.sync_adapters:
        return 0
    require_engine(rollout, adapters=True)
    return policy.lora.rank


def sync_backend(section: RolloutSection, placement: Placement, device: str) -> str:
    """auto is gloo on CPU, CUDA IPC if engines are colocated with the policy, else NCCL."""
    if device != "cpu":
        require_engine(section, on_gpu=True)
    if device != "cpu" and section.sync_backend == "gloo":
        raise ConfigError(f"rollout.sync_backend: {GLOO_ON_GPUS}")
    if section.sync_backend != "auto":
        return section.sync_backend
    if device == "cpu":
        return "gloo"
    return "ipc" if Role.ROLLOUT in placement.group_of(Role.POLICY).roles else "nccl"


def trained_section(section: ModelSection) -> TrainedModelSection:
    """The section of a trained role."""
    assert isinstance(section, TrainedModelSection), section
    return section
