"""The settings of `rlhf plan`: its own, and those of the run that it plans."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from rlhf.config.base import Section
from rlhf.config.commands import TrainConfig
from rlhf.config.flags import ALIASES, Flags
from rlhf.config.load import read_config, resolve
from rlhf.config.merge import Merged, Schema
from rlhf.config.tools import CalibrateConfig, PlanConfig
from rlhf.errors import ConfigError

S = TypeVar("S", bound=Section)

ANY_DATA = ("--data.path", "any")
"""A plan does not read rows, so a run without them can be planned."""


def load_plan(command: str, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[PlanConfig, TrainConfig]:
    """The options of `rlhf plan COMMAND [CONFIG.yaml]`, and the resolved config of the run.

    Raises:
        ConfigError: with every problem, one line each.
    """
    schema = Schema(PlanConfig)
    own, rest = divided(argv, schema)
    merged = Merged(schema, [Flags(own, schema.fields).layer])
    read = read_config(command, rest, environ)
    if read.config is not None and read.config.data.path is None:
        read = read_config(command, [*rest, *ANY_DATA], environ)
    problems = [*merged.problems, *read.problems]
    if problems or merged.config is None or read.config is None:
        raise ConfigError(problems)
    return merged.config, resolve(read.config)


def load_calibrate(argv: Sequence[str]) -> CalibrateConfig:
    """The options of `rlhf plan --calibrate RUN`. Raises ConfigError with every problem."""
    schema = Schema(CalibrateConfig)
    flags = Flags(argv, schema.fields)
    merged = Merged(schema, [flags.layer])
    problems = [*merged.problems, *(f"{word}: unexpected argument." for word in flags.positionals)]
    if problems or merged.config is None:
        raise ConfigError(problems)
    return merged.config


def divided(argv: Sequence[str], schema: Schema[S]) -> tuple[list[str], list[str]]:
    """The words that set a command's own options, and all others, which are the run's."""
    own: list[str] = []
    rest: list[str] = []
    waiting = list(reversed(argv))
    while waiting:
        word = waiting.pop()
        name, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
        field = schema.fields.get(ALIASES.get(name, name))
        if not word.startswith("--") or field is None:
            rest.append(word)
            continue
        own.append(word)
        has_value = field.kind is not bool or waiting[-1:] in (["true"], ["false"])
        if has_value and not equals and waiting:
            own.append(waiting.pop())
    return own, rest
