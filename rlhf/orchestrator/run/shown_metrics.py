"""Which metrics of a step a person gets to see, and how they are written."""

from collections import deque
from collections.abc import Mapping, Sequence

from rlhf.types import Json

HEADLINES = (
    ("reward", "reward/mean_all"),
    ("accuracy", "reward/accuracy"),
    ("accuracy", "pairs/accuracy"),
    ("loss", "policy/loss"),
)
"""Label and name of the metric that says best how a run does: the first that a step has. The policy loss of an online
method says nothing (GRPO's is 0 while the importance ratio is 1), so it is shown of offline methods only."""

OTHERS = (
    ("eval reward", "eval/reward"),
    ("eval accuracy", "eval/accuracy"),
    ("eval loss", "eval/loss"),
    ("loss", "reward/loss"),
    ("kl", "kl/ref_per_response"),
    ("length", "response/length"),
    ("critic loss", "critic/loss"),
    ("grad norm", "policy/grad_norm"),
    ("grad norm", "reward/grad_norm"),
)
SHARES = (("truncated", "response/truncated"), ("equal groups", "groups/zero_std"))
"""Shares, which are shown in percent."""

PHASES = ("wait", "log_probs", "learn", "sync", "evaluate")
"""Phases of the trainer in a step, one after the other."""
PRODUCER_PHASES = ("generate", "score")
"""Phases of the rollout producer: the trainer waits for them, or with max_lag above 0 they run in parallel."""
MIN_SHOWN_S = 0.005
WINDOW = 20
"""Steps over which the time left is estimated."""


class Progress:
    """Steps done and time left."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.step = 0
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Count a step."""
        self.step = step
        seconds = metrics.get("time/step")
        if isinstance(seconds, float):
            self._seconds.append(seconds)

    @property
    def eta(self) -> str:
        """Time left at the pace of the last steps, like 3m20s."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        return show_seconds(mean * (self.num_steps - self.step))


def show_seconds(seconds: float) -> str:
    """Seconds as 12s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def headline(metrics: Mapping[str, Json]) -> tuple[str, float] | None:
    """Label and value of the metric that says best how the run does; None where a step has none of them."""
    found = ((label, number(metrics, name)) for label, name in HEADLINES)
    return next(((label, value) for label, value in found if value is not None), None)


def values_of(metrics: Mapping[str, Json]) -> list[str]:
    """The other metrics that are shown, as `label value`, where a step has them."""
    names = [*OTHERS, *([("loss", "policy/loss")] if "pairs/accuracy" in metrics and not is_online(metrics) else [])]
    found = [f"{label} {value:.4g}" for label, name in names if (value := number(metrics, name)) is not None]
    shares = [f"{label} {value:.0%}" for label, name in SHARES if (value := number(metrics, name)) is not None]
    return found + shares


def pace_of(metrics: Mapping[str, Json]) -> list[str]:
    """Seconds of a step and of its phases, and its throughput."""

    def seconds(names: Sequence[str]) -> list[str]:
        timed = [(name, number(metrics, f"time/{name}") or 0.0) for name in names]
        return [f"{name} {value:.2f}" for name, value in timed if value >= MIN_SHOWN_S]

    produced = ", ".join(seconds(PRODUCER_PHASES))
    shown = ", ".join(
        f"{part} [{produced}]" if produced and part.startswith("wait") else part for part in seconds(PHASES)
    )
    parts = []
    if (total := number(metrics, "time/step")) is not None:
        parts.append(f"{total:.2f} s ({shown})" if shown else f"{total:.2f} s")
    if (speed := number(metrics, "throughput/tokens_per_s")) is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if (share := number(metrics, "throughput/generation_share")) is not None:
        parts.append(f"generation {share:.0%}")
    return parts


def is_online(metrics: Mapping[str, Json]) -> bool:
    """Whether the step's responses were sampled and scored."""
    return "reward/mean_all" in metrics


def number(metrics: Mapping[str, Json], name: str) -> float | None:
    """A metric, where the step has it."""
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) else None
