"""The training methods: for each, its config, and what loading, planning, checks and help need to know about it.

Some methods have members: rloo is a member of grpo, simpo of dpo. A member shares its method's config and has a value
of one setting (algo.type, algo.loss.type) for itself. Each member's name is a command too.
"""

from collections.abc import Iterator, Mapping
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
from rlhf.config.fields import fields_by_name, first_paragraph


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
    member_key: str | None = None
    """The setting that chooses the member."""
    also_typed: tuple[str, str] | None = None
    """A command and a flag that mean this method too."""

    @property
    def summary(self) -> str:
        """One sentence for help texts."""
        return first_paragraph(self.config)

    @property
    def members(self) -> tuple[str, ...]:
        """The values of `member_key`; of an algorithm of the user's own there is no name to type."""
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
