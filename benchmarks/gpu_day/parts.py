"""The parts of the day, in their order, and what each needs."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu_day import commands, training, transfer
from benchmarks.gpu_day.setting import Figures, Setting

WITHOUT_RAY = ("deepspeed",)
ENGINES = ("deepspeed", "ray", "vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing that is tried. `run` raises where it does not hold."""

    run: Callable[[Setting], Figures]
    packages: tuple[str, ...] = ()
    """What must be installed."""
    dry_packages: tuple[str, ...] = ()
    """The same in a dry run, where the transformers engine takes vLLM's place."""
    least_gpus: int = 1
    timeout_s: float = 900.0

    def missing(self, setting: Setting) -> str:
        """Why the part cannot run here; empty if it can."""
        needed = self.dry_packages if setting.is_dry else self.packages
        if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
            return f"{', '.join(absent)} not installed"
        if setting.num_gpus < self.least_gpus and not setting.is_dry:
            return f"needs {self.least_gpus} GPUs"
        return ""


def _with_engines(run: Callable[[Setting], Figures]) -> Part:
    return Part(run=run, packages=ENGINES, dry_packages=ENGINES[:2], timeout_s=1800.0)


PARTS: Mapping[str, Part] = {
    "doctor": Part(run=commands.doctor),
    "checksum": Part(run=transfer.checksums),
    "shared-memory": Part(run=transfer.shared_memory),
    "zero-stages": Part(run=training.zero_stages, packages=WITHOUT_RAY, dry_packages=WITHOUT_RAY),
    "log-probs": Part(run=training.log_probs, packages=WITHOUT_RAY, dry_packages=WITHOUT_RAY),
    "optimizer-swap": Part(run=training.optimizer_swap, packages=WITHOUT_RAY, dry_packages=WITHOUT_RAY),
    "training": Part(run=training.memory_and_speed, packages=WITHOUT_RAY, dry_packages=WITHOUT_RAY),
    "collectives": Part(run=transfer.collectives, packages=WITHOUT_RAY, dry_packages=WITHOUT_RAY, least_gpus=2),
    "tests": Part(run=commands.gpu_tests, packages=("pytest", *ENGINES), dry_packages=("pytest",), timeout_s=3600.0),
    "weight-sync": _with_engines(commands.weight_sync),
    **{name: _with_engines(partial(commands.method, name)) for name in commands.METHODS},
}
