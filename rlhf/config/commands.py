"""The whole config of each command. Only the composition root sees these; a class gets its own section."""

from typing import Literal

from pydantic import Field, PositiveInt

from rlhf.config.algo import PpoSection, RmSection, SftSection
from rlhf.config.base import Section
from rlhf.config.data import DataSection
from rlhf.config.models import CriticSection, ModelSection, SftPolicySection, TrainedModelSection, TrainedRewardSection
from rlhf.config.reward import ModelSource, RewardSection
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

    @property
    def models(self) -> dict[str, ModelSection]:
        """The sections of the run's models by their names in the config."""
        return {}


class SftConfig(TrainConfig):
    """Supervised fine-tuning of a policy on demonstrations."""

    policy: SftPolicySection = SftPolicySection()
    algo: SftSection = SftSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        return {"policy": self.policy}


class RmConfig(TrainConfig):
    """Training a reward model on preferences."""

    reward: TrainedRewardSection = TrainedRewardSection()
    algo: RmSection = RmSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        return {"reward": self.reward}


class PpoConfig(TrainConfig):
    """PPO with GAE: policy, reference, critic and reward on Ray, rollouts by vLLM."""

    policy: TrainedModelSection = TrainedModelSection()
    reference: ModelSection = ModelSection()
    critic: CriticSection = CriticSection()
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    algo: PpoSection = PpoSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        models = {"policy": self.policy, "reference": self.reference, "critic": self.critic, "reward": self.reward}
        sources = {f"reward.sources.{n}": source for n, source in enumerate(self.reward.sources)}
        return models | {name: source for name, source in sources.items() if isinstance(source, ModelSource)}


COMMANDS: dict[str, type[TrainConfig]] = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig}


class GenerateConfig(Section):
    """Samples from a trained model."""

    model: str | None = None
    """Folder or hub name of the model; usually the first argument."""
    prompt: tuple[str, ...] = ()
    """A prompt. Repeatable."""
    prompts: str | None = None
    """File of prompts: one a line, or the rows of a data set."""
    max_tokens: PositiveInt = 256
    """Longest answer."""
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    """Divides the logits; 0 is greedy."""
    num_samples: PositiveInt = 1
    """Answers to each prompt."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the samples."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto is vllm where it is installed, else transformers."""
    debug: bool = False
    """Show tracebacks."""


class QuickstartConfig(Section):
    """The three steps of RLHF on a tiny model of its own."""

    folder: str = "runs/quickstart"
    """Folder for everything that is made; an earlier quickstart there is replaced."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides everything."""
    debug: bool = False
    """Show tracebacks."""
