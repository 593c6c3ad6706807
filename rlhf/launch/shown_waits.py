"""Shows which workers a run waits for, and what a rollout engine does until it replies."""

import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.actors.calls import Worker
from rlhf.engines.rollout.spec import STAGE
from rlhf.orchestrator.run.waits import Waiting

LAST_BYTES = 4096
LOGGED_STAGE = re.compile(re.escape(STAGE) + r"(.+)")


class ShownWaits:
    """A `CallObserver` that shows who has not replied yet."""

    def __init__(self, waiting: Waiting, log_folder: Path) -> None:
        """`log_folder` has the logs of the workers."""
        self._waiting = waiting
        self._log_folder = log_folder

    def wait_started(self, phase: str) -> None:
        """The workers are known later."""

    def workers_awaited(self, phase: str, workers: Sequence[Worker]) -> None:
        """Show these workers."""
        self._waiting(phase, [worker.name for worker in workers], self.stage_of)

    def wait_succeeded(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """Nobody is awaited any longer, which `workers_awaited` has been told."""

    def stage_of(self, name: str) -> str:
        """What a worker does now, as it logged last; empty if it did not say so."""
        try:
            with (self._log_folder / f"{name.replace(' ', '_')}.log").open("rb") as log:
                log.seek(0, 2)
                log.seek(max(0, log.tell() - LAST_BYTES))
                text = log.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        found = LOGGED_STAGE.findall(text)
        return found[-1].strip() if found else ""
