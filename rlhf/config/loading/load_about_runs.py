"""Settings of `rlhf plan` and `rlhf chaos`: the command's own, and those of the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rlhf.config.base import Section
from rlhf.config.commands import TrainConfig
from rlhf.config.loading.flags import ALIASES, Flags
from rlhf.config.loading.layers import SWITCH_WORDS
from rlhf.config.loading.load import read_config
from rlhf.config.loading.merge import Merged, Schema
from rlhf.config.loading.stray_words import refused
from rlhf.config.tools import CalibrateConfig, ChaosConfig, PlanConfig
from rlhf.errors import ConfigError

S = TypeVar("S", bound=Section)

ANY_DATA = ("--data.path", "any")
"""A plan does not read rows, so a run without data can be planned."""
EVERY_STEP = ("--checkpoint.every_steps", "1")
"""A fault then loses one step at most, and every phase of a step is reached."""


def load_plan(command: str, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[PlanConfig, TrainConfig]:
    """The options of `rlhf plan COMMAND [CONFIG.yaml]`, and the resolved config of the run.

    Raises:
        ConfigError: with every problem, one line each.
    """

    def read(rest: Sequence[str]) -> Merged[TrainConfig]:
        found = read_config(command, rest, environ)
        has_no_data = found.config is not None and found.config.data.path is None
        return read_config(command, [*rest, *ANY_DATA], environ) if has_no_data else found

    return _load(PlanConfig, argv, read)


def load_chaos(command: str, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[ChaosConfig, TrainConfig]:
    """The options of `rlhf chaos COMMAND [CONFIG.yaml]`, and the resolved config of the run.

    Raises:
        ConfigError: with every problem, one line each.
    """
    return _load(ChaosConfig, argv, lambda rest: read_config(command, [*rest, *EVERY_STEP], environ))


def load_calibrate(argv: Sequence[str]) -> CalibrateConfig:
    """The options of `rlhf plan --calibrate RUN`. Raises ConfigError with every problem."""
    schema = Schema(CalibrateConfig)
    flags = Flags(argv, schema.fields)
    merged = Merged(schema, [refused(flags.positionals, flags, schema.fields), flags.layer])
    problems = merged.problems
    if problems or merged.config is None:
        raise ConfigError(problems)
    return merged.config


def _load(
    section: type[S], argv: Sequence[str], read: Callable[[Sequence[str]], Merged[TrainConfig]]
) -> tuple[S, TrainConfig]:
    """The command's own options, and the run's config, which `read` makes of all other words."""
    schema = Schema(section)
    own, rest = divided(argv, schema)
    merged = Merged(schema, [Flags(own, schema.fields).layer])
    run = read(rest)
    problems = [*merged.problems, *run.problems]
    if problems or merged.config is None or run.config is None:
        raise ConfigError(problems)
    return merged.config, run.config.resolved()


def divided(argv: Sequence[str], schema: Schema[S]) -> tuple[list[str], list[str]]:
    """The words that set a command's own options, and all others, which belong to the run."""
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
        has_value = not field.is_switch or (bool(waiting) and waiting[-1].lower() in SWITCH_WORDS)
        if has_value and not equals and waiting:
            own.append(waiting.pop())
    return own, rest
