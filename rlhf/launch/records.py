"""What a run writes: config, metrics, trackers, console."""

from rlhf.config.commands import PpoConfig, TrainConfig
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.orchestrator.run.trackers import make_trackers
from rlhf.planning.roles import reward_model


def make_records(config: TrainConfig, directory: RunDirectory, console: Console, num_steps: int) -> Records:
    """The records of a run in its directory, on the console and with the configured trackers."""
    trackers = make_trackers(
        config.log,
        metrics_path=directory.metrics,
        tensorboard_folder=directory.tensorboard,
        name=config.run.name,
        config=config.model_dump(mode="json"),
        warn=console.say,
    )
    return Records(directory, trackers, console, config.log, num_steps, tricks(config))


def tricks(config: TrainConfig) -> dict[str, float]:
    """Those of PPO's tricks that are settings of models and schedules; the algorithm itself logs the others."""
    if not isinstance(config, PpoConfig):
        return {}
    policy, critic = config.policy, config.critic
    source = reward_model(config)
    return {
        "tricks/lr_warmup_and_cosine": float(policy.warmup_ratio > 0 and policy.lr_schedule == "cosine"),
        "tricks/critic_from_reward_model": float(source is not None and critic.model == source.model),
        "tricks/policy_lr_below_critic_lr": float(policy.lr < critic.lr),
    }
