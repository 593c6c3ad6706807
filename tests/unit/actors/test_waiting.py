"""When a wait gives up on workers that are stopped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.post_mortem import LocalProcess, Process
from rlhf.actors.waiting import StoppedWorkers
from rlhf.errors import StallError

RANKS = [Worker(handle=None, name=f"policy rank {n}", node="10.0.0.1", node_id="n1", pid=100 + n) for n in range(2)]
ENGINE = Worker(handle=None, name="rollout engine 0", node="10.0.0.2", node_id="n2", pid=100)
STOPPED = "is stopped (by SIGSTOP or a debugger)"


class Nodes:
    """What `post_mortem` would find on the nodes: at each look the next of `stopped`."""

    def __init__(self, stopped: Iterable[set[Process]]) -> None:
        self.looked_at: list[Mapping[str, Sequence[LocalProcess]]] = []
        self._stopped = iter(stopped)
        self._found: set[Process] = set()

    def find_stopped(self, processes: Mapping[str, Sequence[LocalProcess]]) -> set[Process]:
        self.looked_at.append(processes)
        self._found = next(self._stopped)
        return self._found

    def examine(self, processes: Mapping[str, Sequence[LocalProcess]]) -> dict[Process, str]:
        assert processes == self.looked_at[-1]
        return dict.fromkeys(self._found, STOPPED)


def looks(stopped: Sequence[set[Process]], peers: Sequence[Worker] = ()) -> tuple[int, str]:
    """The look that gave up, from 1 (0 if none did), and its error."""
    nodes = Nodes(stopped)
    watch = StoppedWorkers("learn", peers, find_stopped=nodes.find_stopped, examine=nodes.examine)
    for number in range(1, len(stopped) + 1):
        try:
            watch.check(RANKS)
        except StallError as error:
            return number, str(error)
    return 0, ""


def process(worker: Worker) -> Process:
    return worker.node_id, worker.pid


def test_a_stopped_part_of_an_engine_is_named() -> None:
    part = Worker(handle=None, name="rollout engine 0 part 1", node="10.0.0.3", node_id="n3", pid=7)
    engine = replace(ENGINE, parts=(part,))
    number, error = looks([{process(part)}, {process(part)}], [engine])
    assert number == 2
    assert f"no reply can come from rollout engine 0 part 1 (node 10.0.0.3, pid 7). {part.name} {STOPPED}." in error


A, B = process(RANKS[0]), process(RANKS[1])


@pytest.mark.parametrize(
    ("stopped", "at"),
    [
        ([{A}], 0),
        ([{A}, set(), set()], 0),
        ([{A}, set(), {A}, set()], 0),
        ([{A}, {B}, {A}, {B}], 0),
        ([{A}, {A}], 2),
        ([set(), {A}, {A, B}], 3),
        ([{A}, {B}, {B}], 3),
    ],
)
def test_only_who_is_stopped_in_two_looks_in_a_row_is_given_up(stopped: Sequence[set[Process]], at: int) -> None:
    assert looks(stopped)[0] == at


def test_only_who_is_still_stopped_is_named() -> None:
    _, said = looks([{A}, {A, B}])
    assert said == f"learn: no reply can come from {RANKS[0]}. policy rank 0 {STOPPED}."


def test_a_peer_that_stays_stopped_is_named_instead_of_those_that_wait_for_it() -> None:
    """Another node may have a process of the same id."""
    at, said = looks([{process(ENGINE)}] * 2, peers=[ENGINE])
    assert (at, said) == (2, f"learn: no reply can come from {ENGINE}. rollout engine 0 {STOPPED}.")
