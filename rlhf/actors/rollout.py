"""The pool of rollout engines: what the loop samples from, and what shares the work among them."""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import TypeVar, cast

import ray

from rlhf.actors.calls import Call, Worker, wait_all
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest

Item = TypeVar("Item")


class RolloutPool:
    """Engines that act as one `RolloutEngine`. Thread-safe: it keeps no state but its workers."""

    def __init__(self, workers: Sequence[Worker], *, generate_timeout_s: float, control_timeout_s: float) -> None:
        self.workers = tuple(workers)
        self._generate_timeout_s = generate_timeout_s
        self._control_timeout_s = control_timeout_s

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """One rollout a request, in the order of the requests. Neighbours, which are answers to one prompt, go to
        one engine, where they share the prompt's KV cache."""
        parts = self._split(requests)
        answers = self._all(
            "generation", lambda index, handle: handle.generate.remote(parts[index]), self._generate_timeout_s
        )
        by_id = {rollout.id: rollout for rollout in chain.from_iterable(cast(list[list[Rollout]], answers))}
        return [by_id[request.id] for request in requests]

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """Log-probs by the first engine."""
        return self.score_each(sequences)[0]

    def score_each(self, sequences: Sequence[PackedTokens]) -> list[list[FloatArray]]:
        """Log-probs of the same sequences by every engine: what the probe after a sync compares."""
        answers = self._all(
            "log-prob probe", lambda _index, handle: handle.score.remote(list(sequences)), self._control_timeout_s
        )
        return cast(list[list[FloatArray]], answers)

    def sleep(self) -> None:
        self._all("sleep", lambda _index, handle: handle.sleep.remote(), self._control_timeout_s)

    def wake(self) -> None:
        self._all("wake", lambda _index, handle: handle.wake.remote(), self._control_timeout_s)

    def close(self) -> None:
        self._all("close", lambda _index, handle: handle.close.remote(), self._control_timeout_s)

    def _all(
        self, phase: str, submit: "Callable[[int, ray.actor.ActorHandle], ray.ObjectRef[object]]", timeout_s: float
    ) -> list[object]:
        calls = [Call(worker=worker, ref=submit(index, worker.handle)) for index, worker in enumerate(self.workers)]
        return wait_all(calls, phase=f"rollout {phase}", timeout_s=timeout_s)

    def _split(self, items: Sequence[Item]) -> list[list[Item]]:
        """Contiguous parts of nearly equal size, one an engine."""
        bounds = [len(items) * index // len(self.workers) for index in range(len(self.workers) + 1)]
        return [list(items[start:end]) for start, end in pairwise(bounds)]
