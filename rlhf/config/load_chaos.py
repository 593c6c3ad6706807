"""The settings of `rlhf chaos`: its own, and those of the run that it disturbs."""

from collections.abc import Mapping, Sequence

from rlhf.config.commands import TrainConfig
from rlhf.config.flags import Flags
from rlhf.config.load import read_config, resolve
from rlhf.config.load_plan import divided
from rlhf.config.merge import Merged, Schema
from rlhf.config.tools import ChaosConfig
from rlhf.errors import ConfigError

EVERY_STEP = ("--checkpoint.every_steps", "1")
"""What a fault costs is then a step, and every phase of a step is met."""


def load_chaos(command: str, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[ChaosConfig, TrainConfig]:
    """The options of `rlhf chaos COMMAND [CONFIG.yaml]`, and the resolved config of the run.

    Raises:
        ConfigError: with every problem, one line each.
    """
    schema = Schema(ChaosConfig)
    own, rest = divided(argv, schema)
    merged = Merged(schema, [Flags(own, schema.fields).layer])
    read = read_config(command, [*rest, *EVERY_STEP], environ)
    problems = [*merged.problems, *read.problems]
    if problems or merged.config is None or read.config is None:
        raise ConfigError(problems)
    return merged.config, resolve(read.config)
