"""A process that saves checkpoints is killed at moments of chance, and meets a disk that is full after some bytes.

    python -m tests.unit.orchestrator.run.torture FOLDER NUMBER SEED

does each NUMBER times. After each the newest checkpoint must be whole, and no older than what was said to be saved.
Prints how many saves were cut off, and how many met a full disk.

Without threads, so that it may fork: a fresh interpreter for every kill would take a second each.
"""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf.engines.fakes import FakeTrainEngine
from rlhf.errors import CheckpointError
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.types import Head, Role

STATE = RunState(step=0, seed=7, config={"algo": {"type": "ppo"}})
NUM_WEIGHTS = 20_000
LONGEST_LIFE_S = 0.06


def engines(step: int) -> dict[Role, FakeTrainEngine]:
    """Two roles whose every number says which step they are of."""
    return {
        role: FakeTrainEngine(np.full(NUM_WEIGHTS, float(step)), head)
        for role, head in ((Role.POLICY, Head.LOG_PROBS), (Role.CRITIC, Head.VALUES))
    }


def save_for_ever(folder: Path, first: int, said: int) -> None:
    """Save step after step, and write each to the descriptor `said` once it is saved."""
    checkpoints = Checkpoints(folder, keep=2, warn=lambda _: None, repaired=lambda _: None)
    for step in range(first, first + 10_000):
        checkpoints.save(replace(STATE, step=step), engines(step))
        os.write(said, step.to_bytes(4, "big"))


def child_of(work: Callable[[], None]) -> int:
    """Fork a process that does `work`. Ends with 5 where that fails for the disk."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except CheckpointError:
        code = 5
    finally:
        os._exit(code)


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, both of whose roles must be of that step."""
    path, state = Checkpoints(folder, keep=2, warn=lambda _: None, repaired=lambda _: None).newest()
    for role, engine in engines(-1).items():
        engine.load(path / role)
        assert (engine.table == state.step).all(), (path, role, engine.table[0])
    return state.step


def kill_while_saving(folder: Path, chance: random.Random) -> bool:
    """Returns whether a save was under way."""
    before = newest_step(folder)
    reader, writer = os.pipe()
    pid = child_of(lambda: save_for_ever(folder, before + 1, writer))
    os.close(writer)
    time.sleep(chance.uniform(0.0, LONGEST_LIFE_S))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = os.read(reader, 1 << 16)
    os.close(reader)
    was_cut_off = any(folder.glob("tmp-*"))
    last_said = int.from_bytes(said[-4:], "big") if said else before
    assert last_said <= newest_step(folder) <= last_said + 1, (before, last_said)
    return was_cut_off


class Filling(FakeTrainEngine):
    """A critic whose disk takes no files of more than `limit` bytes from some moment on: `before` it saves, or after,
    when the driver's state and the manifest are written."""

    limit = 0
    before = True

    def save(self, directory: Path) -> None:
        if self.before:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        super().save(directory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def fill_the_disk(folder: Path, chance: random.Random) -> bool:
    """Returns whether the disk was full before the save was done."""
    before = newest_step(folder)
    critic = Filling(np.full(NUM_WEIGHTS, before + 1.0), Head.VALUES)
    critic.before = chance.random() < 0.5
    sizes = [file.stat().st_size for file in (folder / f"step_{before}").rglob("*") if file.is_file()]
    critic.limit = chance.randrange(max(sizes) if critic.before else sorted(sizes)[1] + 100)

    def save() -> None:
        parts = {**engines(before + 1), Role.CRITIC: critic}
        Checkpoints(folder, keep=2, warn=lambda _: None, repaired=lambda _: None).save(
            replace(STATE, step=before + 1), parts
        )

    _, status = os.waitpid(child_of(save), 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 5), code
    assert newest_step(folder) == before + (code == 0)
    assert not any(folder.glob("tmp-*"))
    return code == 5


def main() -> None:
    folder, number, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    Checkpoints(folder, keep=2, warn=lambda _: None, repaired=lambda _: None).save(STATE, engines(0))
    cut_off = sum(kill_while_saving(folder, chance) for _ in range(number))
    full = sum(fill_the_disk(folder, chance) for _ in range(number))
    sys.stdout.write(f"{cut_off} {full}\n")


if __name__ == "__main__":
    main()
