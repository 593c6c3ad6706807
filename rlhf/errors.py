"""One tree of errors. Each class carries the exit code of the command that ends with it, and survives pickling.

An error says what is wrong, with which value, where, and what to do. A user's mistake is shown as such lines, all
of them at once, without a traceback.
"""

from collections.abc import Sequence


class RlhfError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 70


class ConfigError(RlhfError, ValueError):
    """The command line or a config file is wrong. Holds every problem found, one line each."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class DataError(ConfigError):
    """A data set's rows are wrong."""

    exit_code = 3


class ModelError(ConfigError):
    """A model or tokenizer cannot be used as asked."""

    exit_code = 3


class RewardError(RlhfError, RuntimeError):
    """A reward source failed, or returned something that is not a finite number for every answer."""

    exit_code = 4


class CheckpointError(RlhfError, OSError):
    """A checkpoint or run directory cannot be written, read or trusted."""

    exit_code = 5


class NumericsError(RlhfError, ArithmeticError):
    """Numbers stopped being finite, or weights did not move."""

    exit_code = 6


class WorkerLostError(RlhfError, RuntimeError):
    """A worker process died. Names role, rank, node and phase."""

    exit_code = 7


class StallError(RlhfError, TimeoutError):
    """A wait passed its deadline. Names who waited for whom, in which phase, and for how long."""

    exit_code = 8


class WeightSyncError(StallError):
    """A rollout engine does not hold the weights that the policy sent. Names engine, version and bucket."""


class PreemptedError(RlhfError):
    """The run was asked to stop, saved what it had, and can be resumed."""

    exit_code = 75
