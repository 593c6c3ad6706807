"""A long run under kills: whether any process grows, or anything is left behind.

    rlhf example stories
    python -m benchmarks.soak [--steps 1000] [--apart-s 30] [--config FILE.yaml]

`rlhf chaos` runs PPO of small steps with vLLM and ZeRO-3, first in peace and then with a process killed every so often,
and compares the weights. Meanwhile this process looks at all others every few seconds. The table says, for each kind of
process, how many lived long enough, and of those that grew most by how much: the median of the last fifth of a life
over that of its second fifth, after its warm-up. Afterwards nothing of it may be left.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from benchmarks.tables import show

ROOT = Path(__file__).parents[1]
MIB = 2**20
LOOK_S = 3.0
WARM_UP_S = 120.0
"""A process imports, loads and compiles, on two cores beside five others, and meets the longest answers."""
LEAST_LIFE_S = 300.0
"""After the warm-up: of a shorter life nothing can be said."""
LARGEST_GROWTH = 1.05
LEAVING_S = 30.0
STEPS_PER_FAULT = 25
"""A step takes a second or two: all faults find one to strike in."""


@dataclass(kw_only=True)
class Life:
    """What was seen of one process."""

    name: str
    times: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    """Bytes."""
    descriptors: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]

    def growth(self, values: Sequence[int]) -> float:
        """After the warm-up, the last fifth over the second."""
        warm = [value for value, time_s in zip(values, self.times, strict=True) if time_s >= self.times[0] + WARM_UP_S]
        fifth = len(warm) // 5
        return median(warm[-fifth:]) / median(warm[fifth : 2 * fifth])


class Watch:
    """Looks at a process and all below it until it ends."""

    def __init__(self, process: psutil.Process) -> None:
        self.lives: dict[tuple[int, float], Life] = {}
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(LOOK_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [self._process, *self._process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        self._look(process)

    def _look(self, process: psutil.Process) -> None:
        with process.oneshot():
            life = self.lives.setdefault((process.pid, process.create_time()), Life(name=title(process)))
            life.name = title(process)  # Ray renames its workers
            life.times.append(time.monotonic())
            life.resident.append(process.memory_info().rss)
            life.descriptors.append(process.num_fds())


def title(process: psutil.Process) -> str:
    """What a process is, without its number."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith(("ray::", "VLLM")):
        return words[0].split(".")[0].strip()
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else Path(words[0]).name
    scripts = [Path(word).name for word in words[1:3] if word.endswith(".py")]
    return scripts[0] if scripts else module


def left_behind(before: Mapping[Path, set[str]]) -> list[str]:
    """What is in these folders that was not there before. Ray keeps the logs of every session."""
    found = []
    for folder, names in before.items():
        found += [str(folder / name) for name in sorted({path.name for path in folder.iterdir()} - names)]
    return [path for path in found if Path(path).name != "ray"]


def rows_of(lives: Sequence[Life]) -> list[list[str]]:
    """A row for each kind of process."""
    kinds: dict[str, list[Life]] = defaultdict(list)
    for life in lives:
        kinds[life.name].append(life)
    rows = []
    for name, all_lives in sorted(kinds.items()):
        grown = [life for life in all_lives if life.seconds >= WARM_UP_S + LEAST_LIFE_S]
        if not grown:
            continue
        worst = max(grown, key=lambda life: life.growth(life.resident))
        rows.append(
            [
                name,
                f"{len(all_lives)}",
                f"{len(grown)}",
                f"{max(life.seconds for life in grown):.0f}",
                f"{median(worst.resident) / MIB:.0f}",
                f"{worst.growth(worst.resident):.3f}",
                f"{max(life.growth(life.descriptors) for life in grown):.3f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--apart-s", type=float, default=30.0, help="seconds between two kills")
    parser.add_argument("--config", default="configs/ppo_stories_cpu.yaml")
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    folders = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    with tempfile.TemporaryDirectory() as runs:
        before = {folder: {path.name for path in folder.iterdir()} for folder in folders}
        command = [sys.executable, "-m", "rlhf.cli.main", "chaos", "ppo", args.config]
        flags = {
            "--run.dir": runs,
            "--run.name": "soak",
            "--train.num-steps": args.steps,
            "--num-faults": max(1, args.steps // STEPS_PER_FAULT),
            "--apart-s": args.apart_s,
            "--chaos-seed": args.seed,
            "--rollout.batch_size": 16,
            "--rollout.max_response_tokens": 32,
            "--train.batch_size": 16,
            "--checkpoint.keep": 2,
        }
        words = [str(word) for flag, value in flags.items() for word in (flag, value)]
        process = subprocess.Popen([*command, *words, *more], cwd=ROOT)
        with Watch(psutil.Process(process.pid)) as watch:
            code = process.wait()
        deadline = time.monotonic() + LEAVING_S
        alive = [psutil.Process(pid) for pid, _ in watch.lives if psutil.pid_exists(pid)]
        _, alive = psutil.wait_procs(alive, timeout=deadline - time.monotonic())
        left = left_behind(before)
    headings = ["process", "lives", "long lives", "longest, s", "MiB", "growth of memory", "of descriptors"]
    rows = rows_of(list(watch.lives.values()))
    show(f"{args.steps} steps in peace, then under kills {args.apart_s:g} s apart", headings, rows)
    grown = [row[0] for row in rows if max(float(row[5]), float(row[6])) > LARGEST_GROWTH]
    print(f"grew by more than 5 %: {', '.join(grown) or 'none'}")
    print(f"left behind: {', '.join([*map(str, alive), *left]) or 'nothing'}")
    sys.exit(code or bool(grown or alive or left))


if __name__ == "__main__":
    main()
