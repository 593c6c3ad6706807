"""Calling several models at the same time, and waiting for them with a deadline."""

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import ParamSpec, TypeVar

from rlhf.errors import StallError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
P = ParamSpec("P")


def in_thread(call: Callable[P, V], *args: P.args, **kwargs: P.kwargs) -> Future[V]:
    """Run `call` in a daemon thread. A call that never returns does not keep the process from ending, as it would in a
    thread pool."""
    future: Future[V] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:
            # The boundary of the thread: `gather` raises the error in the thread that waits.
            future.set_exception(error)

    threading.Thread(target=run, name="model-call", daemon=True).start()
    return future


def gather(jobs: Mapping[K, Future[V]], *, phase: str, timeout_s: float) -> dict[K, V]:
    """The jobs' results. Raises the first job's error at once, or StallError naming the jobs that did not finish."""
    done, pending = wait(jobs.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for job in done:
        job.result()
    if pending:
        late = ", ".join(str(name) for name, job in jobs.items() if job in pending)
        raise StallError(f"{phase}: the trainer waited {timeout_s:g} s for {late}")
    return {name: job.result() for name, job in jobs.items()}
