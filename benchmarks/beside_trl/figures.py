"""What a run of either side is measured by."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import psutil

MIB = 1024
"""KiB in it, the unit of /proc."""
WARM_UP = 2
"""First steps left out: caches fill, kernels compile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run of one side."""

    step_seconds: list[float]
    """Every step, the first ones too."""
    outcome: list[float]
    """Mean reward (online) or loss (given data) of each step."""
    startup_s: float
    """From the start of the process to the start of the first step."""
    length_mean: float
    length_max: float
    """Of sampled answers, in tokens; 0 where none are sampled."""
    peak_mib: float = 0.0
    phases: dict[str, float] | None = None
    """Median seconds by phase of a step."""

    @property
    def seconds(self) -> float:
        """A step, once warm."""
        return median(self.step_seconds[WARM_UP:])

    @property
    def final(self) -> float:
        """Outcome of the last steps."""
        return mean(self.outcome[-2:])


def resident_mib(process: psutil.Process) -> float:
    """Resident memory of a process and all its descendants; a page that several share counts once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
        except (OSError, ProcessLookupError):
            continue  # it ended, or is a zombie
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / MIB


class MemoryPeak:
    """The largest `resident_mib` seen so far."""

    def __init__(self) -> None:
        self.mib = 0.0

    @contextmanager
    def watching(self, pid: int, interval_s: float = 5.0) -> Iterator[None]:
        """Look at a process and its descendants every so often. Seldom: a look reads the page tables of all of them,
        which took a twentieth of a core from Ray's dozen processes when it came every second."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(interval_s):
                try:
                    self.mib = max(self.mib, resident_mib(psutil.Process(pid)))
                except psutil.NoSuchProcess:
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
