"""`python -m rlhf.cli.chaos_child FOLDER RUN train METHOD ...`: `rlhf train METHOD ...` with faults, for `rlhf chaos`.

FOLDER/plan.json holds the faults in order. Those that were carried out are in FOLDER/witness.jsonl, and are not
repeated by a later process. FOLDER/phases.json lists the phases that the run has been in.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rlhf.actors import post_mortem
from rlhf.actors.calls import Worker
from rlhf.cli.main import exit_code_of, train
from rlhf.errors import WorkerLostError
from rlhf.orchestrator.run.files import append_json, read_rows, write_text
from rlhf.orchestrator.run.run_directory import newest_processes

PHASES: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "generate": r"^rollout generation \d+$",
        "score": r"^scoring$|^reward forward$",
        "log_probs": r"^(policy|critic|reference) forward$",
        "learn": r" (forward_backward|optim_step)$",
        "sync": r"^weight sync ",
        "checkpoint": r" save$",
    }.items()
}
"""Phase of a step -> the names of the waits for remote calls in it."""
DRIVER = "driver"
WITNESSES = "witness.jsonl"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "tear": signal.SIGKILL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault: which process, when, and of what kind."""

    number: int
    kind: str
    process: str
    phase: str
    apart_s: float = 0.0
    """Least seconds since the fault before, or since the driver started."""
    delay_s: float = 0.0
    """Seconds between the start of the wait and the fault in it."""


class Injector:
    """A `CallObserver` that watches the driver's waits, and injects the next fault in the phase that it names.

    A fault is due once the run has saved a step after the fault before; a save during which that fault was injected
    does not count. So at least one step is saved between two faults, and a run that exceeds its restarts does so for a
    reason of its own.

    A fault whose process is already dead, because of an earlier fault that was not noticed yet, is repeated in the next
    such phase.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        strike: Callable[[Fault, str, Callable[[Fault], None]], threading.Thread | None],
        see: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`strike` gets a fault, the wait that it belongs to, and a function to call with a fault whose process was
        gone. It returns the thread that carries the fault out, or None if it is done. `see` gets the name of every
        phase."""
        self._faults = list(faults)
        self._strike = strike
        self._see = see
        self._clock = clock
        self._last_s = clock()
        self._lock = threading.RLock()
        self._phases: set[str] = set()
        self._has_saved = False
        self._has_struck_in_save = False
        self._is_armed = False
        self._striking: threading.Thread | None = None

    def wait_succeeded(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """Only the starts of waits matter."""

    def workers_awaited(self, phase: str, workers: Sequence[Worker]) -> None:
        """Only the starts of waits matter."""

    def wait_started(self, phase: str) -> None:
        """Note the phase, and start the next fault if it is due."""
        name = next((name for name, pattern in PHASES.items() if pattern.search(phase)), None)
        if name is None:
            return
        with self._lock:
            self._see(name)
            self._phases.add(name)
            if name == "learn":
                self._has_struck_in_save = False
            if name != "checkpoint" and self._has_saved:
                self._has_saved, self._is_armed = False, True
            # One whose phase this kind of run does not have must not hold up the others.
            due = next((fault for fault in self._faults if fault.phase in self._phases), None)
            is_armed = due is not None and self._is_armed and self._clock() - self._last_s >= due.apart_s
            if due is not None and is_armed and due.phase == name:
                self._is_armed, self._has_saved, self._last_s = False, False, self._clock()
                self._has_struck_in_save = name == "checkpoint"
                self._faults.remove(due)
                self._striking = self._strike(due, phase, self._give_back)
            elif name == "checkpoint" and not self._has_struck_in_save:
                self._has_saved = self._striking is None or not self._striking.is_alive()

    def _give_back(self, fault: Fault) -> None:
        with self._lock:
            self._faults.insert(0, fault)
            self._is_armed = True


class FaultExecutor:
    """Carries faults out on the processes of a run of this machine, and records them in the folder of faults."""

    def __init__(self, folder: Path, run: Path) -> None:
        self._folder = folder
        self._run = run
        phases = folder / "phases.json"
        self._seen: list[str] = json.loads(phases.read_text(encoding="utf-8")) if phases.exists() else []

    def faults(self) -> list[Fault]:
        """The faults of the plan that have not been carried out yet."""
        plan = json.loads((self._folder / "plan.json").read_text(encoding="utf-8"))
        done = {row["number"] for row in read_rows(self._folder / WITNESSES)}
        return [fault for fault in (Fault(**row) for row in plan) if fault.number not in done]

    def see(self, phase: str) -> None:
        """Record that the run is in a phase."""
        if phase not in self._seen:
            self._seen.append(phase)
            write_text(self._folder / "phases.json", json.dumps(self._seen))

    def strike(self, fault: Fault, text: str, give_back: Callable[[Fault], None]) -> threading.Thread | None:
        """Carry a fault out in the wait that is called `text`: at once, before a worker is called, or in a thread."""
        if not fault.delay_s:
            self._send(fault, text, give_back)
            return None
        timer = threading.Timer(fault.delay_s, self._send, (fault, text, give_back))
        timer.daemon = True
        timer.start()
        return timer

    def _send(self, fault: Fault, text: str, give_back: Callable[[Fault], None]) -> None:
        witness = {**asdict(fault), "wait": text, "time": time.time()}
        if fault.process == DRIVER:
            append_json(self._folder / WITNESSES, {**witness, "pid": os.getpid()})
            os.kill(os.getpid(), SIGNALS[fault.kind])
            return
        victim = next(process for process in newest_processes(self._run) if process.name == fault.process)
        try:
            post_mortem.send_signal(victim.node_id, victim.pid, SIGNALS[fault.kind])
        except WorkerLostError:
            give_back(fault)
            return
        append_json(self._folder / WITNESSES, {**witness, "pid": victim.pid})


def run(argv: list[str]) -> int:
    """Run the command with the faults of its folder. Returns its exit code."""
    folder, run_folder, _train, command, *arguments = argv
    executor = FaultExecutor(Path(folder), Path(run_folder))
    injector = Injector(executor.faults(), executor.strike, executor.see)
    return exit_code_of(partial(train, command, arguments, [injector]), show_traceback="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
