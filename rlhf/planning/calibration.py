"""Correcting a plan with a finished run's measurements."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

from rlhf.errors import DataError
from rlhf.planning.hardware import GIB
from rlhf.planning.plan import Plan
from rlhf.planning.workload import Lengths
from rlhf.types import Json

WARM_UP = 2
"""First steps of a run, which include loading and compiling, and are left out."""
MODELS = "models"
ENGINE = "rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors, and a constant, that turn planned numbers into measured ones. Without any, plans rely on data sheets
    alone."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> measured / planned, of the part that depends on the devices' speed."""
    fixed_seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> measured / planned, of the part that does not; only for phases where this part alone was more than what
    was measured."""
    other_s: float = 0.0
    """Seconds of a step outside the planned phases: bookkeeping, records, checkpoints, rule-based rewards."""
    memory_factors: Mapping[str, float] = field(default_factory=dict)
    """models or rollout -> measured / planned, of a process's memory without its libraries."""

    def time(self, phase: str, seconds: float, fixed: float) -> float:
        """The time to expect for planned `seconds`, of which `fixed` do not depend on the devices' speed."""
        return fixed * self.fixed_seconds.get(phase, 1.0) + (seconds - fixed) * self.seconds.get(phase, 1.0)

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises DataError if the file was not written by `write`."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{file}: not a calibration: {error}.") from error


NONE = Calibration()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run's typical step by its metrics: medians over its steps except the first ones."""

    seconds: Mapping[str, float]
    """Phase -> seconds."""
    step_s: float
    memory: Mapping[str, float]
    """Roles of a process, as `policy+reference` -> its peak memory in bytes."""
    lengths: Lengths


def measured(steps: Sequence[Mapping[str, Json]], phases: Sequence[str], num_sequences: int) -> Measured:
    """Read the lines of a metrics.jsonl. `num_sequences` are learned from in a step.

    Raises:
        DataError: there are too few steps, or most of them learned from nothing.
    """
    usual = steps[WARM_UP:]
    if not usual:
        raise DataError(f"calibration: the run has {len(steps)} steps, need more than {WARM_UP}.")

    def middle(name: str) -> float:
        return median(_number(step, name) for step in usual)

    tokens = median(_number(step, "throughput/tokens_per_s") * _number(step, "time/step") for step in usual)
    if not tokens:
        raise DataError("calibration: most steps of the run learned from nothing, so they show no lengths.")
    each = tokens / num_sequences
    response = min(middle("response/length"), each)
    names = sorted({name for step in usual for name in step if name.startswith("memory/")})
    return Measured(
        seconds={phase: middle(f"time/{phase}") for phase in phases if middle(f"time/{phase}")},
        step_s=middle("time/step"),
        memory={name.removeprefix("memory/"): GIB * max(_number(step, name) for step in usual) for name in names},
        lengths=Lengths(prompt=each - response, response=response),
    )


def _number(step: Mapping[str, Json], name: str) -> float:
    """A metric of a step; 0 if it is missing, or was not finite."""
    value = step.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def calibrated(found: Measured, plan: Plan) -> Calibration:
    """The factors between the plan and what was measured. The fixed cost of each forward pass and token is taken as
    planned, because it does not depend on the model: a calibration also serves other models on the same machine."""
    seconds: dict[str, float] = {}
    fixed_seconds: dict[str, float] = {}
    for phase, planned in plan.seconds.items():
        if not planned or phase not in found.seconds:
            continue
        measured_s, fixed = found.seconds[phase], plan.fixed_seconds[phase]
        if fixed < min(measured_s, planned):
            seconds[phase] = (measured_s - fixed) / (planned - fixed)
        else:
            seconds[phase] = fixed_seconds[phase] = measured_s / planned
    other_s = max(0.0, found.step_s - sum(found.seconds[phase] for phase in seconds))
    factors: dict[str, list[float]] = {}
    for name, planned in plan.processes.items():
        if name in found.memory:
            libraries = plan.libraries[name]
            factor = max(0.0, found.memory[name] - libraries) / (planned - libraries)
            factors.setdefault(ENGINE if name == ENGINE else MODELS, []).append(factor)
    means = {kind: sum(values) / len(values) for kind, values in factors.items()}
    return Calibration(seconds=seconds, fixed_seconds=fixed_seconds, other_s=other_s, memory_factors=means)
