"""What independent checks of a run find, raised as one error, so that a user sees all of it at once."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from rlhf.errors import ConfigError, RewardError

T = TypeVar("T")


class Findings:
    """The errors of checks that do not need each other, with each line once."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._classes: set[type[ConfigError]] = set()
        self._failed: RewardError | None = None

    def __bool__(self) -> bool:
        return bool(self._lines)

    def attempt(self, check: Callable[[], T]) -> T | None:
        """What a check returns; None if it raises, which is kept."""
        try:
            return check()
        except ConfigError as error:
            self.add(error.problems, type(error))
        except RewardError as error:
            self._failed = self._failed or error
            self.add([str(error)])
        return None

    def add(self, lines: Sequence[str], error: type[ConfigError] = ConfigError) -> None:
        """Keep lines that `error` would be raised with. One that says of a setting what an earlier line says of it,
        by the place that set it, is left out."""
        new = [line for line in lines if not any(known.endswith(_said(line)) for known in self._lines)]
        self._lines += new
        self._classes |= {error for _ in new}

    def blames(self, key: str) -> bool:
        """Whether a line is about this setting."""
        return any(line.startswith(f"{key}:") for line in self._lines)

    def settle(self) -> None:
        """Raise what was found, if anything.

        Raises:
            ConfigError: with every line. Its subclass DataError or ModelError if all lines are of that class.
            RewardError: a reward function failed, and nothing else is wrong.
        """
        if self._failed is not None and len(self._lines) == 1:
            raise self._failed
        if self:
            raise refusal(self._lines, self._classes)


def refusal(problems: Sequence[str], classes: Collection[type[ConfigError]]) -> ConfigError:
    """The error for these problems: of their class if they have the same one, else a ConfigError."""
    kind, *others = classes
    return (ConfigError if others else kind)(problems)


def _said(line: str) -> str:
    """A line without the setting that it begins with."""
    return line.partition(": ")[2] or line
