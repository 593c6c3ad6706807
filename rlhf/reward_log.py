"""`rlhf.log`: numbers that a reward function reports beside its scores. Imports only the standard library.

The function's process collects them here, and takes them after each call.
"""

import math
import re
import threading
from dataclasses import dataclass, field
from typing import SupportsFloat

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,99}")
TAKEN = frozenset(
    {"mean", "mean_all", "std", "unscored", "shaped", "clipped", "overlong", "running_mean", "running_std"}
)
"""Names after `reward/` of metrics that a run logs itself; those of its sources begin with `source/`."""


@dataclass(slots=True)
class Collected:
    """Sums and counts of what was logged since the last `take`, by name."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


_collected = Collected()


def log(name: str, value: SupportsFloat) -> None:
    """Report a number from inside a reward function: the metric `reward/NAME` is its mean over the step, and
    `eval/reward/NAME` over an evaluation.

    It may be called any number of times, from threads and from async functions, for each response or for all of a call.
    Numbers of processes that the function starts are not seen. NaN and infinity are left out of the mean.

    Raises:
        ValueError: the name has other characters than letters, digits and `_./-`, is longer than 100, or is that of a
            metric that the run logs itself.
        TypeError: the value is not a number.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"rlhf.log: a name has 1 to 100 letters, digits and _./- (got {name[:100]!r})")
    if name in TAKEN or name.startswith("source/"):
        raise ValueError(f"rlhf.log: the run logs reward/{name} itself; choose another name than {name!r}")
    if isinstance(value, str):
        raise TypeError(f"rlhf.log: {name} is not a number (got text)")
    number = float(value)
    if not math.isfinite(number):
        return
    with _collected.lock:
        _collected.sums[name] = _collected.sums.get(name, 0.0) + number
        _collected.counts[name] = _collected.counts.get(name, 0) + 1


def take() -> dict[str, float]:
    """The mean of each name since the last call, which is then forgotten."""
    with _collected.lock:
        means = {name: total / _collected.counts[name] for name, total in _collected.sums.items()}
        _collected.sums.clear()
        _collected.counts.clear()
    return means
