"""How busy rollout engines are: a simulation of many engines, in virtual time, with the real rules of the stream.

    python -m benchmarks.stream [--quick]

64 engines of 256 slots, 16,384 responses a step, lengths geometric with a mean of 2,048 tokens and cut at 32,768. An
engine decodes one token for each of its slots in a unit of time, and learning from a step takes as long as all slots of
all engines need for a step's tokens. Which groups are asked for, expire and make up a step is `GroupStream`; which
engine serves a request is `least_loaded`, as in a run. Beside them is what whole batches would do: a step's responses
are dealt to the engines once, by number, and the next step's are asked for when the last one is complete.

busy: share of the slots in use, over time. useful: share of the sampled tokens that are learned from; the others belong
to groups that became too old or, *masked*, are older than their response's last token (algo.mask_stale_tokens). steps:
how many steps are made in the time that `batches, max_lag 0` makes one.
"""

import argparse
import heapq
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.tables import show
from rlhf.engines.rollout.loads import Load, least_loaded
from rlhf.orchestrator.step.stream import GroupStream, StreamLimits

MEAN_TOKENS = 2048
MOST_TOKENS = 32768
PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The engines, and the work of a step."""

    num_engines: int = 64
    slots: int = 256
    batch_size: int = 16384
    """Groups of one step."""
    group_size: int = 1
    slow: float = 1.0
    """Speed of the first engine, relative to the others."""
    num_steps: int = 24
    warm_up: int = 6
    seed: int = 0

    @property
    def learn_time(self) -> float:
        """As long as generation takes with all slots in use."""
        return self.batch_size * self.group_size * MEAN_TOKENS / (self.num_engines * self.slots)

    def speed(self, engine: int) -> float:
        return self.slow if engine == 0 else 1.0

    def lengths(self) -> Iterator[list[int]]:
        """Tokens of each group's responses, group after group."""
        generator = np.random.default_rng(self.seed)
        while True:
            drawn = generator.geometric(1.0 / MEAN_TOKENS, (4096, self.group_size))
            yield from np.minimum(drawn, MOST_TOKENS).tolist()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulation found after the warm-up."""

    busy: float
    useful: float
    step_time: float
    expired: float
    """Groups that expired, for each that was learned from."""


@dataclass
class Simulation:
    """Engines, trainer and stream; events are (time, order, what, which)."""

    cluster: Cluster
    limits: StreamLimits
    now: float = 0.0
    used: float = 0.0
    sampled: float = 0.0
    learned: float = 0.0
    num_expired: int = 0
    ends: list[float] = field(default_factory=list)
    marks: list[tuple[float, float, float]] = field(default_factory=list)
    """used, sampled, learned at the end of each step."""

    def __post_init__(self) -> None:
        cluster = self.cluster
        self.stream = GroupStream(self.limits, first_step=1, last_step=10**9)
        self.loads = [Load() for _ in range(cluster.num_engines)]
        self.running = [0] * cluster.num_engines
        self.queued: list[deque[tuple[int, int]]] = [deque() for _ in range(cluster.num_engines)]
        self.unsent: deque[int] = deque()
        self.drawn = cluster.lengths()
        self.lengths: dict[int, list[int]] = {}
        """Of the groups under way."""
        self.left: dict[int, int] = {}
        """Responses of them that are not complete."""
        self.started: dict[int, dict[int, tuple[int, float]]] = defaultdict(dict)
        """Number of a group -> number of a response -> its engine, and when it began."""
        self.versions: dict[int, int] = {}
        self.tokens: dict[int, float] = {}
        """Those that are learned from."""
        self.released_at = 0.0
        self.events: list[tuple[float, int, str, tuple[int, int, int]]] = []
        self.order = 0
        self.formed: deque[Sequence[int]] = deque()
        self.is_learning = False

    def run(self) -> Outcome:
        """Until the last step is made."""
        self.advance()
        while len(self.ends) < self.cluster.num_steps:
            time, _, what, which = heapq.heappop(self.events)
            self.used += sum(self.running) * (time - self.now)
            self.now = time
            if what == "response":
                self.end_response(*which)
            else:
                self.end_step()
            self.advance()
        first = self.cluster.warm_up - 1
        (used, sampled, learned), span = self.marks[first], self.now - self.ends[first]
        steps = self.cluster.num_steps - self.cluster.warm_up
        return Outcome(
            busy=(self.used - used) / (span * self.cluster.num_engines * self.cluster.slots),
            useful=min(1.0, (self.learned - learned) / max(self.sampled - sampled, 1.0)),
            step_time=span / steps,
            expired=self.num_expired / (self.cluster.num_steps * self.limits.batch_size),
        )

    def at(self, time: float, what: str, which: tuple[int, int, int]) -> None:
        self.order += 1
        heapq.heappush(self.events, (time, self.order, what, which))

    def advance(self) -> None:
        self.expire()
        while (batch := self.stream.form_batch()) is not None:
            self.formed.append(batch.numbers)
            self.expire()
        for one in self.stream.ask():
            self.lengths[one.number] = lengths = next(self.drawn)
            self.left[one.number] = len(lengths)
            self.versions[one.number] = 10**9 if self.limits.counts_newest else self.stream.version
            self.tokens[one.number] = 0.0 if self.limits.counts_newest else sum(lengths)
            self.unsent.append(one.number)
        self.send()
        if self.formed and not self.is_learning:
            self.is_learning = True
            self.at(self.now + self.cluster.learn_time, "step", (0, 0, 0))

    def expire(self) -> None:
        for number in self.stream.expire():
            self.num_expired += 1
            self.left.pop(number, None)
            self.lengths.pop(number, None)
            for engine, since in self.started.pop(number, {}).values():
                self.free(engine, (self.now - since) * self.cluster.speed(engine))

    def send(self) -> None:
        while self.unsent:
            number, size = self.unsent[0], self.cluster.group_size
            if number not in self.left:  # it has expired
                self.unsent.popleft()
                continue
            engine = least_loaded(self.loads, size, self.cluster.slots * 5 // 4)
            if engine is None:
                return
            self.unsent.popleft()
            for index in range(size):
                self.loads[engine].add(PROMPT_TOKENS + MOST_TOKENS)
                self.queued[engine].append((number, index))
            self.fill(engine)

    def fill(self, engine: int) -> None:
        while self.queued[engine] and self.running[engine] < self.cluster.slots:
            number, index = self.queued[engine].popleft()
            if number not in self.left:  # aborted before it began
                self.loads[engine].remove(PROMPT_TOKENS + MOST_TOKENS)
                continue
            self.running[engine] += 1
            self.started[number][index] = engine, self.now
            took = self.lengths[number][index] / self.cluster.speed(engine)
            self.at(self.now + took, "response", (engine, number, index))

    def free(self, engine: int, tokens: float) -> None:
        """A response has ended, or was aborted, after so many tokens."""
        self.running[engine] -= 1
        self.sampled += tokens
        self.loads[engine].remove(PROMPT_TOKENS + MOST_TOKENS)
        self.fill(engine)

    def end_response(self, engine: int, number: int, index: int) -> None:
        if number not in self.left:
            return  # it was aborted
        _, since = self.started[number].pop(index)
        if self.limits.counts_newest:
            self.versions[number] = min(self.versions[number], self.stream.version)
            self.tokens[number] += (self.now - max(since, self.released_at)) * self.cluster.speed(engine)
        self.free(engine, self.lengths[number][index])
        self.left[number] -= 1
        if not self.left[number]:
            del self.left[number], self.lengths[number], self.started[number]
            self.stream.complete(number, keep=True, version=self.versions[number])

    def end_step(self) -> None:
        self.is_learning = False
        for number in self.formed.popleft():
            self.learned += self.tokens.pop(number)
        self.stream.release()
        self.released_at = self.now
        self.ends.append(self.now)
        self.marks.append((self.used, self.sampled, self.learned))


def batches(cluster: Cluster, max_lag: int) -> Outcome:
    """What whole batches would do."""
    per_engine = cluster.batch_size * cluster.group_size // cluster.num_engines
    assert per_engine <= cluster.slots, "one wave"
    produced, live, used = 0.0, [0.0], 0.0
    drawn = cluster.lengths()
    for step in range(cluster.num_steps):
        slot = live[step - max_lag] if step >= max_lag else 0.0
        start = max(produced, slot)
        lengths = np.array([n for _ in range(cluster.batch_size) for n in next(drawn)])
        speeds = np.repeat([cluster.speed(engine) for engine in range(cluster.num_engines)], per_engine)
        produced = start + float((lengths / speeds).max())
        used += float((lengths / speeds).sum())
        live.append(max(produced, live[-1]) + cluster.learn_time)
    span = live[-1]
    return Outcome(
        busy=used / (span * cluster.num_engines * cluster.slots),
        useful=1.0,
        step_time=span / cluster.num_steps,
        expired=0.0,
    )


def simulate(cluster: Cluster, max_lag: int, order: str) -> Outcome:
    """The stream."""
    limits = StreamLimits(
        batch_size=cluster.batch_size,
        max_lag=max_lag,
        order="fifo" if order == "fifo" else "ready",
        counts_newest=order == "ready, masked",
    )
    return Simulation(cluster, limits).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the engines")
    quick = parser.parse_args().quick
    scale = 16 if quick else 1
    rows = []
    for group_size, slow in ((1, 1.0), (1, 0.5), (8, 1.0)):
        cluster = Cluster(
            num_engines=64 // scale, batch_size=16384 // scale // group_size, group_size=group_size, slow=slow
        )
        base = batches(cluster, 0)
        cases = [("batches", lag, batches(cluster, lag)) for lag in (0, 1, 2)]
        cases += [("fifo", lag, simulate(cluster, lag, "fifo")) for lag in (0, 1, 2, 4)]
        cases += [("ready", lag, simulate(cluster, lag, "ready")) for lag in (1, 2, 4, 8)]
        cases += [("ready, masked", lag, simulate(cluster, lag, "ready, masked")) for lag in (2, 4)]
        for name, lag, found in cases:
            rows.append(
                [
                    str(group_size),
                    "one at half speed" if slow < 1.0 else "equal",
                    name,
                    str(lag),
                    f"{found.busy:.1%}",
                    f"{found.useful:.1%}",
                    f"{found.expired:.2f}",
                    f"{base.step_time / found.step_time:.2f}",
                ]
            )
            print(*rows[-1], flush=True)
    header = ["group size", "engines", "order", "max_lag", "busy", "useful", "expired", "steps"]
    show("Engines in virtual time", header, rows)


if __name__ == "__main__":
    main()
