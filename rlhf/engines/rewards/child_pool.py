"""Several child processes that run the same function, each on one item at a time."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.function_process import ChildFailedError, ChildOverranError, FunctionProcess
from rlhf.errors import RewardError
from rlhf.repair import Repaired
from rlhf.types import Json

NUM_TRIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A child's result for one item; `score` is None if it failed, and `failure` says how. `parts` are the numbers that
    the function returned beside the score."""

    score: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


def call_with(*placed: Json, **named: Json) -> dict[str, Json]:
    """A request to call a function with a list of one entry for each argument."""
    return {
        "placed": [[value] for value in placed],
        "named": {name: [value] for name, value in named.items()},
        "each": False,
        "count": 1,
    }


class ChildPool:
    """Evaluates items by a function `module:name`, called with one item, in child processes.

    An item may take `timeout_s`; a child that takes longer is replaced. A child that dies may have been killed for
    another reason than its item (out of memory): it is replaced, and the item is tried once more.

    Consumes: items of one `evaluate` call at a time. Produces: verdicts, in the order of the items. Waits for: a free
    child, then its reply. Unblocked by: the reply or the item's timeout.
    """

    def __init__(
        self,
        function: str,
        *,
        num_processes: int,
        timeout_s: float,
        memory_gib: float | None,
        repaired: Repaired = log_repair,
    ) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        # The first child shows whether the function can be loaded; the others are started when needed.
        self._children = [FunctionProcess(function, memory_gib=memory_gib, repaired=repaired)]
        self._open: Callable[[], FunctionProcess] = lambda: FunctionProcess(
            function, memory_gib=memory_gib, repaired=repaired
        )
        self._num_processes = num_processes
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="reward-child")

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the function's parameters."""
        return frozenset(parameter.name for parameter in self._children[0].parameters)

    def evaluate(self, items: Sequence[Mapping[str, Json]]) -> list[Verdict]:
        """One verdict for each item; an item is a request of user_code.py."""
        with self._lock:
            while len(self._children) < min(self._num_processes, len(items)):
                self._children.append(self._open())
            free: queue.SimpleQueue[FunctionProcess] = queue.SimpleQueue()
            for child in self._children:
                free.put(child)

            def evaluate_one(item: Mapping[str, Json]) -> Verdict:
                child = free.get()
                try:
                    return self._evaluate(child, item)
                finally:
                    free.put(child)

            return list(self._threads.map(evaluate_one, items))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        with self._lock:
            for child in self._children:
                child.close()

    def _evaluate(self, child: FunctionProcess, item: Mapping[str, Json]) -> Verdict:
        failure = ""
        for _ in range(NUM_TRIES):
            try:
                reply = child.ask(item, self._timeout_s)
            except ChildOverranError as error:
                child.tell(f"{error} on one item; its process was replaced, and the item is not tried again")
                return Verdict(score=None, failure=str(error))
            except ChildFailedError as error:
                failure = str(error)
                child.tell(f"its process {failure}; it was replaced")
                continue
            scores, parts = reply.get("scores"), reply.get("parts")
            if isinstance(scores, list) and len(scores) == 1 and isinstance(scores[0], int | float):
                assert isinstance(parts, dict), "the child sends an object"
                first = {name: values[0] for name, values in parts.items() if isinstance(values, list)}
                numbers = {name: float(value) for name, value in first.items() if isinstance(value, int | float)}
                return Verdict(score=float(scores[0]), parts=numbers)
            raise RewardError(f"reward: {reply.get('raised') or reply.get('wrong') or f'bad scores {scores}'}.")
        return Verdict(score=None, failure=failure)
