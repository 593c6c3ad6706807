"""The pool of rollout engines: distributes requests over the engines."""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TypeVar, cast

from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest

Item = TypeVar("Item")


class RolloutPool:
    """Engines that act as one `RolloutEngine`. Thread-safe: its only state is its groups of workers."""

    def __init__(
        self,
        group: WorkerGroup,
        *,
        generate_timeout_s: float,
        control_timeout_s: float,
        colocated: Sequence[WorkerGroup] = (),
        colocated_timeout_s: float = 0.0,
    ) -> None:
        """`colocated` are the models on the same devices; they release unused memory before the engines wake, which
        waits for what they are doing: `colocated_timeout_s` is the longest that one of their calls may take."""
        self._group = group
        self._colocated = colocated
        self._colocated_timeout_s = colocated_timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._control_timeout_s = control_timeout_s

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """One rollout for each request, in the order of the requests. Neighboring requests, which are for the same
        prompt, go to the same engine, where they share the prompt's KV cache."""
        parts = self._split(requests)
        results = self._all(
            "generation", lambda index, handle: handle.generate.remote(parts[index]), self._generate_timeout_s
        )
        by_id = {rollout.id: rollout for rollout in chain.from_iterable(cast(list[list[Rollout]], results))}
        return [by_id[request.id] for request in requests]

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """Log-probs by the first engine."""
        results = self._all(
            "scoring", lambda _index, handle: handle.score.remote(list(sequences)), self._control_timeout_s
        )
        return cast(list[list[FloatArray]], results)[0]

    def require_alive(self) -> None:
        """Check that every engine replies. Lost ones are replaced if engines are replaceable."""
        self._all("health check", lambda _index, handle: handle.location.remote(), self._control_timeout_s)

    def sleep(self) -> None:
        self._all("sleep", lambda _index, handle: handle.sleep.remote(), self._control_timeout_s)

    def wake(self) -> None:
        for group in self._colocated:
            group.run(
                lambda _rank, handle: handle.release_memory.remote(),
                phase="release of memory for engines",
                timeout_s=self._colocated_timeout_s + self._control_timeout_s,
            )
        self._all("wake", lambda _index, handle: handle.wake.remote(), self._control_timeout_s)

    def close(self) -> None:
        self._all("close", lambda _index, handle: handle.close.remote(), self._control_timeout_s)

    def _all(self, phase: str, submit: Submit, timeout_s: float) -> list[object]:
        return self._group.run(submit, phase=f"rollout {phase}", timeout_s=timeout_s)

    def _split(self, items: Sequence[Item]) -> list[list[Item]]:
        """Contiguous parts of nearly equal size, one an engine."""
        num_engines = len(self._group.workers)
        bounds = [len(items) * index // num_engines for index in range(num_engines + 1)]
        return [list(items[start:end]) for start, end in pairwise(bounds)]
