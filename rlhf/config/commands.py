"""The whole config of each command. Only the composition root sees these; a class gets its own section."""

from rlhf.config.algo import PpoSection, RmSection, SftSection
from rlhf.config.base import Section
from rlhf.config.data import DataSection
from rlhf.config.models import CriticSection, ModelSection, SftPolicySection, TrainedModelSection, TrainedRewardSection
from rlhf.config.reward import RewardSection
from rlhf.config.rollout import RolloutSection
from rlhf.config.run import (
    CheckpointSection,
    ClusterSection,
    EvalSection,
    LogSection,
    RunSection,
    TrainSection,
)


class TrainConfig(Section):
    """What every training command has."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    cluster: ClusterSection = ClusterSection()


class SftConfig(TrainConfig):
    """Supervised fine-tuning of a policy on demonstrations."""

    policy: SftPolicySection = SftPolicySection()
    algo: SftSection = SftSection()


class RmConfig(TrainConfig):
    """Training a reward model on preferences."""

    reward: TrainedRewardSection = TrainedRewardSection()
    algo: RmSection = RmSection()


class PpoConfig(TrainConfig):
    """PPO with GAE: policy, reference, critic and reward on Ray, rollouts by vLLM."""

    policy: TrainedModelSection = TrainedModelSection()
    reference: ModelSection = ModelSection()
    critic: CriticSection = CriticSection()
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    algo: PpoSection = PpoSection()


COMMANDS: dict[str, type[TrainConfig]] = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig}
