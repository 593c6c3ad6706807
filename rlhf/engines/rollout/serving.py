"""Which version of the weights a rollout engine serves, and whether it may serve it now.

serving <--wake-- asleep          serving --begin_update--> updating --serve--> serving
        --sleep-->                                                   --fail--> failed --begin_update--> ...

An engine that is asleep can have its weights alone woken, and then take new ones. It is asleep again afterwards:

asleep --wake_weights--> asleep --begin_update--> updating --serve--> asleep --wake--> serving
"""

import threading
from enum import StrEnum

from rlhf.errors import RlhfError, StallError, WeightSyncError


class ServingState(StrEnum):
    """The state of an engine."""

    SERVING = "serving"
    UPDATING = "updating"
    FAILED = "failed"
    ASLEEP = "asleep"


class ServingGate:
    """Lets requests through only while the engine holds a complete, verified version of the weights.

    Consumes: state changes, from the threads that sync weights, sleep and wake. Produces: the version to serve, for
    each caller of `enter`. Waits for: the end of an update (in `enter`). Unblocked by: `serve`, `fail`. Thread-safe.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._state = ServingState.SERVING
        self._sleeps = False
        self._has_weights = True
        self._version = 0
        self._digest: str | None = None
        self._problem = ""

    @property
    def state(self) -> ServingState:
        return self._state

    @property
    def sleeps(self) -> bool:
        """Whether some of the engine's memory is released, whatever the state."""
        return self._sleeps

    @property
    def has_weights(self) -> bool:
        """Whether there is memory for weights."""
        return self._has_weights

    @property
    def version(self) -> int:
        """The newest version that was received completely and served."""
        return self._version

    def enter(self, timeout_s: float) -> int:
        """Wait until no update is running; returns the version to serve. Raises WeightSyncError if the last update
        failed, RlhfError if the engine is asleep, StallError if the update takes longer than `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state is not ServingState.UPDATING, timeout_s):
                raise StallError(f"engine {self._engine}: waited {timeout_s:g} s for the end of a weight update")
            if self._state is ServingState.FAILED:
                raise WeightSyncError(f"engine {self._engine}: serves nothing until a complete sync: {self._problem}")
            if self._state is ServingState.ASLEEP:
                raise RlhfError(f"engine {self._engine}: asleep. Wake it before asking for work")
            return self._version

    def sleep(self) -> None:
        """Enter sleep mode. Raises RlhfError unless the engine is serving or already asleep."""
        self._move({ServingState.SERVING, ServingState.ASLEEP}, ServingState.ASLEEP, "sleep")
        self._sleeps, self._has_weights = True, False

    def wake_weights(self) -> None:
        """The weights have memory again, so that the engine can take new ones; nothing else changes."""
        self._has_weights = True

    def wake(self) -> None:
        """Leave sleep mode; nothing changes if the engine is awake."""
        self._sleeps, self._has_weights = False, True
        if self._state is ServingState.ASLEEP:
            self._move({ServingState.ASLEEP}, ServingState.SERVING, "wake")

    def require_serving(self) -> None:
        """Raises RlhfError in every other state."""
        self._move({ServingState.SERVING}, ServingState.SERVING, "be reset")

    def begin_update(self) -> None:
        """Stop serving, to receive new weights. An update that never ended is abandoned."""
        self._digest = None
        allowed = {ServingState.SERVING, ServingState.UPDATING, ServingState.FAILED}
        if self._has_weights:
            allowed.add(ServingState.ASLEEP)
        self._move(allowed, ServingState.UPDATING, "take new weights")

    def received(self, digest: str) -> None:
        """Record that all buckets of the update arrived as they were sent; `digest` is that of the whole version."""
        if self._state is not ServingState.UPDATING:
            raise WeightSyncError(f"engine {self._engine}: weights arrived while {self._state}: no update was started")
        self._digest = digest

    def fail(self, problem: Exception) -> None:
        """Record that the update failed: serve nothing until another one succeeds."""
        self._problem = str(problem)
        self._move(set(ServingState), ServingState.FAILED, "fail")

    def serve(self, version: int, digest: str) -> str:
        """Serve the received version, once it is awake, if its digest equals `digest`, the sender's. Returns the digest
        of what was received; raises WeightSyncError if it differs."""
        if self._state is not ServingState.UPDATING or self._digest is None or self._digest != digest:
            have = self._digest or f"nothing while {self._state}"
            error = WeightSyncError(f"engine {self._engine}: version {version}: received {have}, need {digest}")
            self.fail(error)
            raise error
        self._version = version
        after = ServingState.ASLEEP if self._sleeps else ServingState.SERVING
        self._move({ServingState.UPDATING}, after, "serve")
        return self._digest

    def _move(self, allowed: set[ServingState], to: ServingState, what: str) -> None:
        with self._changed:
            if self._state not in allowed:
                raise RlhfError(f"engine {self._engine}: cannot {what} while {self._state}")
            self._state = to
            self._changed.notify_all()
