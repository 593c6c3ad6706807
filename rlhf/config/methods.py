"""The training methods: for each, its config, and what loading, planning, checks and help need to know about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.config.commands import (
    DpoConfig,
    GrpoConfig,
    KtoConfig,
    OnlineDpoConfig,
    OnlineKtoConfig,
    PpoConfig,
    PrmConfig,
    RmConfig,
    SftConfig,
    TrainConfig,
)
from rlhf.config.data import RowKind
from rlhf.config.fields import first_paragraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method that `rlhf train` offers. How its rows are loaded and evaluated is in rlhf.launch.methods."""

    config: type[TrainConfig]
    rows: RowKind
    """What the data set's rows are read as."""
    model: str = "policy"
    """The config's name of the model that the run is about."""
    sequences_per_example: int = 1
    """2 where an example is a pair of responses."""

    @property
    def summary(self) -> str:
        """One sentence for help texts."""
        return first_paragraph(self.config)


METHODS: Mapping[str, Method] = {
    "sft": Method(config=SftConfig, rows=RowKind.DEMONSTRATIONS),
    "rm": Method(config=RmConfig, rows=RowKind.PREFERENCES, model="reward", sequences_per_example=2),
    "prm": Method(config=PrmConfig, rows=RowKind.STEPS, model="reward"),
    "ppo": Method(config=PpoConfig, rows=RowKind.PROMPTS),
    "grpo": Method(config=GrpoConfig, rows=RowKind.PROMPTS),
    "online-dpo": Method(config=OnlineDpoConfig, rows=RowKind.PROMPTS, sequences_per_example=2),
    "online-kto": Method(config=OnlineKtoConfig, rows=RowKind.PROMPTS),
    "dpo": Method(config=DpoConfig, rows=RowKind.PREFERENCES, sequences_per_example=2),
    "kto": Method(config=KtoConfig, rows=RowKind.LABELED),
}


def method_name(config: TrainConfig) -> str:
    """The name of the method that a config belongs to."""
    return next(name for name, method in METHODS.items() if method.config is type(config))


def method_of(config: TrainConfig) -> Method:
    """The method that a config belongs to."""
    return METHODS[method_name(config)]
