"""Which weights a rollout engine serves, and whether it may serve them now.

serving <--wake-- asleep          serving --begin_update--> updating --serve--> serving
        --sleep-->                                                   --refuse--> refused --begin_update--> ...
"""

import threading
from enum import StrEnum

from rlhf.errors import RlhfError, StallError, WeightSyncError


class Serving(StrEnum):
    """What an engine is doing."""

    SERVING = "serving"
    UPDATING = "updating"
    REFUSED = "refused"
    ASLEEP = "asleep"


class ServingGate:
    """Lets work through only while a whole verified version is there.

    Consumes: state changes from the control plane. Waits for: the end of an update. Unblocked by: serve, refuse.
    Thread-safe.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._state = Serving.SERVING
        self._version = 0
        self._digest: str | None = None
        self._problem = ""

    @property
    def state(self) -> Serving:
        return self._state

    @property
    def version(self) -> int:
        """The newest version that was served whole."""
        return self._version

    def enter(self, timeout_s: float) -> int:
        """Wait out an update; returns the version to serve. Raises WeightSyncError where the last one was refused,
        RlhfError where the engine is asleep, StallError when the update takes longer than `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state is not Serving.UPDATING, timeout_s):
                raise StallError(f"engine {self._engine}: waited {timeout_s:g} s for the end of a weight update")
            if self._state is Serving.REFUSED:
                raise WeightSyncError(f"engine {self._engine}: serves nothing until a whole sync: {self._problem}")
            if self._state is Serving.ASLEEP:
                raise RlhfError(f"engine {self._engine}: asleep. Wake it before asking for work")
            return self._version

    def sleep(self) -> None:
        """Only an engine that serves may fall asleep."""
        self._move({Serving.SERVING, Serving.ASLEEP}, Serving.ASLEEP, "sleep")

    def wake(self) -> None:
        """Waking an engine that is awake changes nothing."""
        if self._state is Serving.ASLEEP:
            self._move({Serving.ASLEEP}, Serving.SERVING, "wake")

    def require_serving(self) -> None:
        """Raises RlhfError in every other state."""
        self._move({Serving.SERVING}, Serving.SERVING, "begin anew")

    def begin_update(self) -> None:
        """Stop serving, for new weights. An update that never ended is given up."""
        self._digest = None
        self._move({Serving.SERVING, Serving.UPDATING, Serving.REFUSED}, Serving.UPDATING, "take new weights")

    def received(self, digest: str) -> None:
        """All buckets of the update arrived as they were sent."""
        if self._state is not Serving.UPDATING:
            raise WeightSyncError(f"engine {self._engine}: weights arrived while {self._state}: no update was started")
        self._digest = digest

    def refuse(self, problem: Exception) -> None:
        """The update failed: serve nothing until another succeeds."""
        self._problem = str(problem)
        self._move(set(Serving), Serving.REFUSED, "refuse")

    def serve(self, version: int, digest: str) -> str:
        """Serve what was received, if it is what was sent. Returns its digest."""
        if self._state is not Serving.UPDATING or self._digest is None or self._digest != digest:
            have = self._digest or f"nothing while {self._state}"
            error = WeightSyncError(f"engine {self._engine}: version {version}: received {have}, need {digest}")
            self.refuse(error)
            raise error
        self._version = version
        self._move({Serving.UPDATING}, Serving.SERVING, "serve")
        return self._digest

    def _move(self, allowed: set[Serving], to: Serving, what: str) -> None:
        with self._changed:
            if self._state not in allowed:
                raise RlhfError(f"engine {self._engine}: cannot {what} while {self._state}")
            self._state = to
            self._changed.notify_all()
