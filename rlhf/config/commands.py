"""The whole config of each training method, and `METHODS`: what loading, planning, checks and help know about a method.

Only the composition root sees a whole config; a class gets its own section. Some methods have members: rloo is a member
of grpo, simpo of dpo. A member shares its method's config and fixes the value of one setting (algo.type,
algo.loss.type). Each member's name is a command too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from rlhf.config.algo import (
    AlgorithmSection,
    CriticFree,
    CustomSection,
    DpoSection,
    GrpoSection,
    KtoSection,
    OnlineDpoSection,
    OnlineKtoSection,
    OnlinePreference,
    PpoSection,
    PrmSection,
    RmSection,
    SftSection,
)
from rlhf.config.base import Section
from rlhf.config.data import DataSection
from rlhf.config.fields import fields_by_name, first_paragraph
from rlhf.config.models import (
    CriticSection,
    ModelSection,
    PreferencePolicySection,
    SftPolicySection,
    StoredReferenceSection,
    TrainedModelSection,
    TrainedRewardSection,
)
from rlhf.config.reward import ModelSource, RewardSection, Source, StartedSource
from rlhf.config.rollout import (
    GroupRolloutSection,
    LabeledRolloutSection,
    PairRolloutSection,
    RolloutSection,
    engines_that,
)
from rlhf.config.run import (
    CheckpointSection,
    ClusterSection,
    EvalSection,
    LogSection,
    RunSection,
    TrainSection,
)


class TrainConfig(Section):
    """What every training method has."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    cluster: ClusterSection = ClusterSection()
    if TYPE_CHECKING:  # each command's own field comes after its models, in help texts and messages
        algo: AlgorithmSection

    @property
    def models(self) -> dict[str, ModelSection]:
        """The sections of the run's models by their names in the config."""
        return {}

    def resolved(self) -> Self:
        """The config with every default that depends on other values filled in, so that the saved config is complete.
        Resolving twice changes nothing."""
        colocate = tuple(flag.replace(" ", "") for flag in self.cluster.colocate)
        return self._with(cluster=self.cluster.model_copy(update={"colocate": colocate}))

    def _with(self, **sections: Section) -> Self:
        return self.model_copy(update=sections)

    @property
    def is_online(self) -> bool:
        """Whether the policy learns from its own responses."""
        return False

    @property
    def examples_per_step(self) -> int:
        """Most examples that a step learns from."""
        return self.train.batch_size

    @property
    def rows_per_step(self) -> tuple[str, int]:
        """The setting that says how many rows of the data set a step reads, and its value."""
        return "train.batch_size", self.train.batch_size

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.data.max_tokens

    @property
    def reward_sources(self) -> tuple[Source, ...]:
        """What scores responses; empty in an offline run."""
        return ()

    @property
    def max_lag(self) -> int:
        """The greatest staleness of the weights that sample; 0 in an offline run."""
        return 0


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


class PrmConfig(TrainConfig):
    """Training a process reward model on labeled steps."""

    reward: TrainedRewardSection = TrainedRewardSection()
    algo: PrmSection = PrmSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        return {"reward": self.reward}


class ReferencedConfig(TrainConfig):
    """A policy that learns from a data set of responses, and stays close to a reference model."""

    policy: PreferencePolicySection = PreferencePolicySection()
    reference: StoredReferenceSection = StoredReferenceSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        models: dict[str, ModelSection] = {"policy": self.policy}
        return models | {"reference": self.reference} if self.algo.uses_reference else models

    def resolved(self) -> Self:
        """The reference starts as the policy."""
        return super().resolved()._with(reference=self.reference.beside(self.policy))


class DpoConfig(ReferencedConfig):
    """DPO and its variants, on a data set of pairs."""

    algo: Annotated[DpoSection | CustomSection, Field(discriminator="type")] = DpoSection()

    def resolved(self) -> Self:
        """The learning rate is that of the loss, if none is given."""
        config = super().resolved()
        if not isinstance(self.algo, DpoSection):
            return config
        return config._with(policy=self.policy.with_default_lr(self.algo.loss.default_lr))


class KtoConfig(ReferencedConfig):
    """KTO, on a data set of responses that are labeled good or bad."""

    algo: KtoSection = KtoSection()


class OnlineConfig(TrainConfig):
    """What all online methods have: rollouts by vLLM, scored by reward sources."""

    policy: TrainedModelSection = TrainedModelSection()
    reference: ModelSection = ModelSection()
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        models = {"policy": self.policy, "reference": self.reference, "reward": self.reward}
        sources = {f"reward.sources.{n}": source for n, source in enumerate(self.reward.sources)}
        return models | {name: source for name, source in sources.items() if isinstance(source, StartedSource)}

    def resolved(self) -> Self:
        """The reference starts as the policy; limits on the length of responses are those of rollouts; an environment
        or agent gives the reward if nothing else does."""
        longest = self.rollout.max_response_tokens
        reward = self.reward.by_environment() if self.rollout.gives_reward else self.reward
        return (
            super()
            .resolved()
            ._with(
                reference=self.reference.beside(self.policy),
                reward=reward.for_answers_of(longest),
                algo=self.algo.with_lengths(longest),
            )
        )

    @property
    def is_online(self) -> bool:
        return True

    @property
    def longest_sequence(self) -> int:
        return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def reward_sources(self) -> tuple[Source, ...]:
        return self.reward.all_sources

    @property
    def rows_per_step(self) -> tuple[str, int]:
        return "rollout.batch_size", self.rollout.batch_size

    @property
    def max_lag(self) -> int:
        return self.rollout.max_lag

    @property
    def examples_per_step(self) -> int:
        return self.rollout.batch_size * self.rollout.group_size


class PpoConfig(OnlineConfig):
    """PPO with GAE: policy, reference, critic and reward on Ray, rollouts by vLLM."""

    critic: CriticSection = CriticSection()
    algo: Annotated[PpoSection | CustomSection, Field(discriminator="type")] = PpoSection()

    @property
    def models(self) -> dict[str, ModelSection]:
        return {**super().models, "critic": self.critic}

    def resolved(self) -> Self:
        """The critic starts as the reward model if there is one, else as the policy."""
        if self.critic.model is not None:
            return super().resolved()
        rewards = (source.model for source in self.reward.all_sources if isinstance(source, ModelSource))
        model = next(rewards, self.policy.model)
        return super().resolved()._with(critic=self.critic.model_copy(update={"model": model}))


class GrpoConfig(OnlineConfig):
    """GRPO and the other methods without a critic (RLOO, REINFORCE++, DAPO, ...), chosen by algo.type."""

    rollout: GroupRolloutSection = GroupRolloutSection()
    algo: CriticFree = GrpoSection()


class OnlineDpoConfig(OnlineConfig):
    """Online DPO: best against worst of the policy's own responses to each prompt."""

    policy: PreferencePolicySection = PreferencePolicySection()
    rollout: PairRolloutSection = PairRolloutSection()
    algo: OnlinePreference = OnlineDpoSection()

    def resolved(self) -> Self:
        """A mixture of two models is sampled by an engine that can mix them."""
        if not self.algo.mixture or self.rollout.engine != "auto":
            return super().resolved()
        engine = engines_that(lambda traits: traits.mixes)[0]
        return super().resolved()._with(rollout=self.rollout.model_copy(update={"engine": engine}))

    @property
    def examples_per_step(self) -> int:
        return self.rollout.batch_size


class OnlineKtoConfig(OnlineConfig):
    """KTO on the policy's own responses, labeled by their scores."""

    policy: PreferencePolicySection = PreferencePolicySection()
    rollout: LabeledRolloutSection = LabeledRolloutSection()
    algo: OnlineKtoSection = OnlineKtoSection()


class RowKind(StrEnum):
    """What the rows of a data set are read as, by the name in `rlhf data NAME`. What a row of each kind holds, and how
    it is read, is in rlhf.orchestrator.data.kinds."""

    PROMPTS = "prompts"
    DEMONSTRATIONS = "demonstrations"
    PREFERENCES = "preferences"
    LABELED = "labeled"
    STEPS = "steps"
    TEXTS = "texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method that `rlhf train` offers. Its evaluator is in rlhf.launch.methods."""

    config: type[TrainConfig]
    rows: RowKind
    """What the rows of the data set are read as."""
    model: str = "policy"
    """Config name of the model that the method trains and exports."""
    sequences_per_example: int = 1
    """2 if an example is a pair of responses."""
    member_key: str | None = None
    """The setting that chooses the member."""
    also_typed: tuple[str, str] | None = None
    """A command and a flag that mean the same method."""

    @property
    def summary(self) -> str:
        """One sentence for help texts."""
        return first_paragraph(self.config)

    @property
    def members(self) -> tuple[str, ...]:
        """The values of `member_key`, except custom: an algorithm of the user's own has no name here."""
        if self.member_key is None:
            return ()
        return tuple(name for name in fields_by_name(self.config)[self.member_key].variants if name != "custom")


METHODS: Mapping[str, Method] = {
    "sft": Method(config=SftConfig, rows=RowKind.DEMONSTRATIONS),
    "rm": Method(config=RmConfig, rows=RowKind.PREFERENCES, model="reward", sequences_per_example=2),
    "prm": Method(config=PrmConfig, rows=RowKind.STEPS, model="reward"),
    "ppo": Method(config=PpoConfig, rows=RowKind.PROMPTS),
    "grpo": Method(config=GrpoConfig, rows=RowKind.PROMPTS, member_key="algo.type"),
    "online-dpo": Method(config=OnlineDpoConfig, rows=RowKind.PROMPTS, sequences_per_example=2, member_key="algo.type"),
    "online-kto": Method(config=OnlineKtoConfig, rows=RowKind.PROMPTS, also_typed=("kto", "--online")),
    "dpo": Method(config=DpoConfig, rows=RowKind.PREFERENCES, sequences_per_example=2, member_key="algo.loss.type"),
    "kto": Method(config=KtoConfig, rows=RowKind.LABELED),
}


def method_name(config: TrainConfig) -> str:
    """The name of the method that a config belongs to."""
    return next(name for name, method in METHODS.items() if method.config is type(config))


def method_of(config: TrainConfig) -> Method:
    """The method that a config belongs to."""
    return METHODS[method_name(config)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What `rlhf train NAME` trains: a method, or one member of a method."""

    name: str
    method: str
    key: str | None = None
    """The setting whose value a member's name decides."""

    @property
    def config(self) -> type[TrainConfig]:
        return METHODS[self.method].config


def _commands() -> Iterator[Command]:
    for name, method in METHODS.items():
        yield Command(name=name, method=name)
        for member in method.members:
            if member not in METHODS:
                yield Command(name=member, method=name, key=method.member_key)


COMMANDS: Mapping[str, Command] = {command.name: command for command in _commands()}
