"""Flags that are repeated. The last value counts, so that a script's flags can be overridden, but for some settings a
user may believe that all do."""

import warnings

ONE_PATH = ("data.path", "data.eval_path")
"""Settings that take one value, where other tools take several."""


class RepeatedFlagWarning(UserWarning):
    """A flag was repeated, and only its last value is used."""


def warn_repeated(flag: str, unread: object, read: object) -> None:
    """Warn that only the last value of a flag is used."""
    text = f"{flag}: given twice; {read} is read, {unread} is not. Name one path, a folder or a glob."
    warnings.warn(text, RepeatedFlagWarning, stacklevel=3)
