"""Everything that a run records or shows, in one place."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rlhf.config.run import LogSection
from rlhf.engines.base import Tracker
from rlhf.errors import CheckpointError, PreemptedError
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.repairs import RepairCount
from rlhf.orchestrator.run.responses import StepResponses
from rlhf.orchestrator.run.run_directory import RunDirectory, Status
from rlhf.orchestrator.run.samples_shown import most_telling
from rlhf.repair import Repair, RepairKind
from rlhf.types import Json

GOOD_NEWS = ("resume",)
"""Kinds of events that are no warnings."""
EVENTS = {RepairKind.WORKER: "replacement", RepairKind.RESTART: "restart"}
"""The events of repairs; of the others it is `repair`."""


class Records:
    """Sends metrics, events and samples of a run to its folder, its trackers and the console. Trackers are opened by
    `open`, so that a run that is refused before leaves nothing in them."""

    def __init__(
        self,
        directory: RunDirectory,
        open_trackers: Callable[[], Sequence[Tracker]],
        console: Console,
        section: LogSection,
        num_steps: int,
    ) -> None:
        self.directory = directory
        self._open_trackers = open_trackers
        self._trackers: Sequence[Tracker] = ()
        self._console = console
        self._section = section
        self._num_steps = num_steps
        self._step = 0
        self._repairs = RepairCount()
        self._writing_status = threading.Lock()
        self._has_ended = False

    def step(self, step: int, metrics: Mapping[str, Json], responses: StepResponses) -> None:
        """Record a finished step."""
        self._step = step
        for tracker in self._trackers:
            with self._lossy():
                tracker.log(step, metrics)
        self._console.log(step, metrics)
        if self._section.rollouts:
            with self._lossy():
                self.directory.write_responses(step, responses)
        every_steps = self._section.sample_every_steps
        if responses.trained and every_steps and step % every_steps == 0:
            self._console.sample(step, most_telling(responses.trained))
        self.status(Status.RUNNING, step)

    def note(self, kind: str, text: str, **more: Json) -> None:
        """Record an event for the user: on the console and, with `more`, in events.jsonl."""
        with self._lossy():
            self.directory.note(kind, text, step=self._step, **more)
        (self._console.say if kind in GOOD_NEWS else self._console.warn)(f"{kind}: {text}")

    def repair(self, repair: Repair) -> None:
        """Record what the run repaired by itself: in events.jsonl and the metric `repairs/count` each time, on the
        console the first time that it happens there. May be called from any thread."""
        is_new, event = self._repairs.add(repair), EVENTS.get(repair.kind, "repair")
        with self._lossy():
            more: dict[str, Json] = {"repaired": repair.kind.value, "count": repair.count}
            self.directory.note(event, repair.text, step=self._step, **more)
        if is_new:
            self._console.warn(f"{event}: {repair.text}")

    def take_repair_metrics(self) -> dict[str, float]:
        """How many repairs there were since the last call."""
        return {"repairs/count": float(self._repairs.take())}

    def warn(self, text: str) -> None:
        """Record a warning: an event that may need the user to act."""
        self.note("warning", text)

    def say(self, text: str) -> None:
        """Show a line on the console only."""
        self._console.say(text)

    def status(self, status: Status, step: int) -> None:
        """Write the status of the run to its folder, unless it has ended: another thread may have found that it has."""
        self._step = step
        with self._writing_status, self._lossy():
            if not self._has_ended:
                self.directory.write_status(status, step=step, num_steps=self._num_steps)

    @contextmanager
    def _lossy(self) -> Iterator[None]:
        """Inside, a full disk loses a record, with a warning, and the run goes on. Failed checkpoints may end it."""
        try:
            yield
        except CheckpointError as error:
            self._console.say(f"warning: {error}; the run goes on without this record")

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Record an error that is raised inside as the end of the run."""
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise

    def end(self, error: BaseException) -> None:
        """Record `error` as the end of the run. May be called from any thread."""
        status = Status.PREEMPTED if isinstance(error, PreemptedError) else Status.FAILED
        text = f"{type(error).__name__}: {error}"
        with self._writing_status, self._lossy():
            self._has_ended = True
            self.directory.write_status(status, step=self._step, num_steps=self._num_steps, error=text)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, trackers are in use. An error is recorded as the end of the run; folder and console stay open."""
        try:
            with self.recording_failure():
                self._trackers = self._open_trackers()
                yield
        finally:
            for tracker in self._trackers:
                tracker.close()
