"""What episodes cost the processes that run them, without a model: CPU time a turn, memory and threads.

    python -m benchmarks.episodes [--episodes 2000] [--turns 5] [--rounds 5] [--workers 0] [--processes 1]

All episodes of a round are under way at the same time. The engine answers at once with a call of a tool that the
environment has, so that each turn renders and encodes a conversation, and asks a process. `--workers` runs the
environments in Ray actors.

Columns are milliseconds of CPU time a turn: of the driver, of the workers, and of the processes of the user's code;
then the resident memory of all of them and the driver's threads, both at the end of the round.
"""

import argparse
import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.tables import show
from rlhf.config.run import ClusterSection
from rlhf.engines.base import Tokenizer
from rlhf.environments.engine import EpisodeEngine, FaultPolicy
from rlhf.environments.environment import Result
from rlhf.environments.episode import EpisodeLimits
from rlhf.environments.formats.known import find_format
from rlhf.environments.host import describe
from rlhf.environments.routing import RunRules
from rlhf.environments.session import LocalSessions, Sessions
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.types import FinishReason, FloatArray, PackedTokens, Rollout, RolloutRequest
from tests.unit.environments.support import byte_tokenizer, make_prompt, make_request

TIMEOUT_S = 300.0
MOST_TOKENS = 100_000
CALL = '<tool_call>\n{"name": "put", "arguments": {"what": "book"}}\n</tool_call><|im_end|>'
OVER = "over<|im_end|>"


class Shelf:
    """An environment whose method is a tool."""

    def __init__(self) -> None:
        self.num_kept = 0

    def reset(self) -> None: ...

    def put(self, what: str) -> Result:
        """Put something on the shelf."""
        self.num_kept += 1
        return Result(f"{self.num_kept} times {what}", 0.1)

    def reward(self) -> float:
        return 1.0


class InstantEngine:
    """A `RolloutEngine` that answers at once: with calls, and in the last turn without one."""

    def __init__(self, tokenizer: Tokenizer, num_turns: int) -> None:
        self._call = np.array(tokenizer.encode(CALL), dtype=np.int64)
        self._over = np.array(tokenizer.encode(OVER), dtype=np.int64)
        self._last = f"turn{num_turns - 1}"

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        return [self._answer(request) for request in requests]

    def abort(self, request_ids: Collection[str]) -> None: ...

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        return []

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def _answer(self, request: RolloutRequest) -> "Future[Rollout]":
        ids = self._over if request.id.endswith(self._last) else self._call
        future: Future[Rollout] = Future()
        future.set_result(
            Rollout(
                id=request.id,
                prompt_id=request.prompt_id,
                token_ids=ids,
                log_probs=np.full(len(ids), -0.5, dtype=np.float32),
                finish_reason=FinishReason.STOP,
                weight_version=0,
            )
        )
        return future


@dataclass(frozen=True, kw_only=True)
class Usage:
    """CPU seconds so far by kind of process, resident bytes of all, and threads of this process."""

    cpu_s: dict[str, float]
    memory: int
    num_threads: int


def usage() -> Usage:
    """What this process and those below it use, Ray's own aside."""
    cpu_s = {"driver": 0.0, "workers": 0.0, "user code": 0.0}
    memory = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            if process == own:
                kind = "driver"
            elif words.startswith("ray::Environment"):
                kind = "workers"
            elif "rlhf.environments.child" in words:
                kind = "user code"
            else:
                continue
            spent = process.cpu_times()
            cpu_s[kind] += spent.user + spent.system
            memory += process.memory_info().rss
    return Usage(cpu_s=cpu_s, memory=memory, num_threads=own.num_threads())


@contextlib.contextmanager
def opened(spec: WorldSpec, num_workers: int, num_processes: int) -> Iterator[Sessions]:
    """Sessions on this node, or in workers of a cluster of their own."""
    if not num_workers:
        yield LocalSessions(spec, num_processes=num_processes, timeout_s=TIMEOUT_S)
        return
    from rlhf.actors.cluster import Cluster  # noqa: PLC0415  Ray, which is not needed above
    from rlhf.actors.environment_workers import EnvironmentsSpec, open_workers  # noqa: PLC0415

    given = EnvironmentsSpec(world=spec, num_workers=num_workers, num_processes=num_processes, timeout_s=TIMEOUT_S)
    with Cluster(ClusterSection(), namespace="benchmark") as cluster:
        yield open_workers(cluster, given, timeout_s=TIMEOUT_S, on_replaced=None)


def measure(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each round."""
    tokenizer = byte_tokenizer()
    spec = WorldSpec(environments=("benchmarks.episodes:Shelf",))
    described = describe(spec)
    (world,) = described.worlds
    prompt = make_prompt(tokenizer, tools=world.tools, is_open=True)
    rules = RunRules(
        tokenizer=tokenizer,
        described=described,
        format=find_format(tokenizer, world.tools),
        limits=EpisodeLimits(
            max_turns=options.turns,
            max_turn_tokens=None,
            max_tool_response_tokens=100,
            context=MOST_TOKENS,
            max_tokens=MOST_TOKENS,
        ),
    )
    rows = []
    with opened(spec, options.workers, options.processes) as sessions:
        faults = FaultPolicy(num_retries=0, on_error="fail")
        engine = EpisodeEngine(InstantEngine(tokenizer, options.turns), spec, rules, faults, [prompt], sessions)
        for number in range(options.rounds):
            before, start = usage(), time.monotonic()
            requests = [make_request(prompt, f"{number}/{n}", max_tokens=MOST_TOKENS) for n in range(options.episodes)]
            for future in engine.submit(requests):
                rollout = future.result(TIMEOUT_S)
                assert isinstance(rollout, EpisodeRollout)
                assert rollout.episode.ending is Ending.ANSWER, rollout.episode
                assert rollout.episode.num_turns == options.turns
            seconds, after = time.monotonic() - start, usage()
            num_turns = options.episodes * options.turns
            each = [1000 * (after.cpu_s[kind] - before.cpu_s[kind]) / num_turns for kind in after.cpu_s]
            memory, threads = f"{after.memory / 2**20:.0f} MiB", str(after.num_threads)
            rows.append((str(number + 1), f"{seconds:.1f} s", *(f"{one:.2f}" for one in each), memory, threads))
        engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2000, help="episodes under way at the same time")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="Ray actors that run the environments; 0: this node")
    parser.add_argument("--processes", type=int, default=1, help="processes of the user's code, of each worker")
    options = parser.parse_args()
    where = f"{options.workers} workers" if options.workers else "this node"
    headings = ("round", "time", "driver", "workers", "user code", "memory", "threads")
    show(f"{options.episodes} episodes of {options.turns} turns, {where}", headings, measure(options))


if __name__ == "__main__":
    main()
