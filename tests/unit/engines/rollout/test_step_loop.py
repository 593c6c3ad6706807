"""The thread that steps a decoder: who gets what, and how failures and stalls reach those who wait."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest

from rlhf.engines.rollout.serving import ServingGate
from rlhf.engines.rollout.step_loop import DecodeRequest, StepLoop, StepOutput
from rlhf.errors import MemoryExhaustedError, ModelError, RlhfError, StallError, WorkerLostError
from rlhf.types import FinishReason, Sampling

pytestmark = pytest.mark.timeout(30)


class CountingCore:
    """Answers a prompt with its first token, `max_tokens` times. A prompt token of -1 breaks a step, -2 hangs one, -3
    needs more memory than there is."""

    def __init__(self) -> None:
        self.requests: dict[str, tuple[DecodeRequest, int]] = {}
        self.aborted: list[str] = []
        self.hang = threading.Event()
        self.thread = threading.current_thread()
        self.largest_batch = 0

    def add(self, request_id: str, request: DecodeRequest) -> None:
        if not len(request.token_ids):
            raise ModelError("empty prompt")
        self.requests[request_id] = (request, 0)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def step(self) -> list[StepOutput]:
        assert threading.current_thread() is self.thread
        self.largest_batch = max(self.largest_batch, len(self.requests))
        time.sleep(0.001)
        outputs = []
        for request_id, (request, count) in list(self.requests.items()):
            token = int(request.token_ids[0])
            if token == -1:
                raise RuntimeError("a broken kernel")
            if token == -3:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            if token == -2:
                self.hang.wait(20)
            assert request.sampling is not None
            done = count + 1 == request.sampling.max_tokens
            self.requests[request_id] = (request, count + 1)
            if done:
                del self.requests[request_id]
            outputs.append(StepOutput(request_id, [token], [-0.5], None, FinishReason.LENGTH if done else None))
        return outputs


@pytest.fixture
def gate() -> ServingGate:
    return ServingGate("e")


@pytest.fixture
def loop(gate: ServingGate) -> Iterator[StepLoop[CountingCore]]:
    loop = StepLoop("e", CountingCore, gate, 5)
    yield loop
    loop.core.hang.set()
    loop.close(5)


def ask(token: int, max_tokens: int = 3) -> DecodeRequest:
    return DecodeRequest(np.array([token]), Sampling(max_tokens=max_tokens))


def test_responses_come_in_the_order_of_the_requests(loop: StepLoop[CountingCore]) -> None:
    answers = loop.decode([ask(5, 9), ask(6, 1), ask(7, 4)])
    assert [answer.token_ids for answer in answers] == [[5] * 9, [6], [7] * 4]
    assert answers[0].log_probs == [-0.5] * 9
    assert answers[0].finish_reason is FinishReason.LENGTH


def test_callers_share_the_batch(loop: StepLoop[CountingCore]) -> None:
    results: dict[int, list[int]] = {}

    def call(token: int) -> None:
        results[token] = loop.decode([ask(token, 50)])[0].token_ids

    threads = [threading.Thread(target=call, args=(token,)) for token in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {token: [token] * 50 for token in range(8)}
    assert loop.core.largest_batch > 1


def test_no_requests_give_no_responses(loop: StepLoop[CountingCore]) -> None:
    assert loop.decode([]) == []


def test_a_request_that_cannot_be_served_fails_its_whole_call_and_no_other(loop: StepLoop[CountingCore]) -> None:
    with pytest.raises(ModelError, match="empty prompt"):
        loop.decode([ask(1, 10_000), DecodeRequest(np.array([], dtype=np.int64), Sampling(max_tokens=1))])
    loop.call(lambda: None)  # after what the failure left to do
    assert len(loop.core.aborted) == 1
    assert loop.num_pending == 0
    assert loop.decode([ask(2)])[0].token_ids == [2, 2, 2]


def test_a_failed_step_raises_in_every_waiting_and_later_caller(loop: StepLoop[CountingCore]) -> None:
    errors: list[Exception] = []

    def call() -> None:
        try:
            loop.decode([ask(1, 100_000)])
        except WorkerLostError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.05)
    with pytest.raises(WorkerLostError, match=r"engine e: its decoder has ended: .*a broken kernel"):
        loop.decode([ask(-1)])
    thread.join(5)
    assert len(errors) == 1
    with pytest.raises(WorkerLostError, match="a broken kernel"):
        loop.decode([ask(1)])
    with pytest.raises(WorkerLostError, match="a broken kernel"):
        loop.call(lambda: 1)


@pytest.fixture
def hasty(gate: ServingGate) -> Iterator[StepLoop[CountingCore]]:
    """Waits 0.4 s for a token."""
    loop = StepLoop("e", CountingCore, gate, 0.4)
    yield loop
    loop.core.hang.set()
    loop.close(5)


def test_a_step_that_hangs_is_a_stall(hasty: StepLoop[CountingCore]) -> None:
    start = time.monotonic()
    with pytest.raises(StallError, match=r"engine e: no token for .* s with 2 responses missing"):
        hasty.decode([ask(-2), ask(1, 100_000)])
    assert 0.4 < time.monotonic() - start < 2


def test_a_long_response_is_no_stall(hasty: StepLoop[CountingCore]) -> None:
    assert len(hasty.decode([ask(1, 700)])[0].token_ids) == 700  # takes longer than the 0.4 s


def test_a_long_weight_update_is_no_stall(hasty: StepLoop[CountingCore], gate: ServingGate) -> None:
    (response,) = hasty.submit([ask(5, 200)]).values()
    hasty.call(gate.begin_update)
    time.sleep(0.9)
    assert not response.done()
    gate.received("same")
    hasty.call(lambda: gate.serve(1, "same"))
    assert len(response.result(5).token_ids) == 200


def test_an_idle_loop_does_not_count_as_stalled(hasty: StepLoop[CountingCore]) -> None:
    time.sleep(0.6)
    assert len(hasty.decode([ask(1, 50)])[0].token_ids) == 50


def test_each_request_has_its_own_end(loop: StepLoop[CountingCore]) -> None:
    """A short response does not wait for a long one, and one that cannot be served fails alone."""
    empty = DecodeRequest(np.array([], dtype=np.int64), Sampling(max_tokens=1))
    long, short, refused = loop.submit([ask(1, 100_000), ask(2), empty]).values()
    assert short.result(5).token_ids == [2, 2, 2]
    with pytest.raises(ModelError, match="empty prompt"):
        refused.result(5)
    assert not long.done()
    assert loop.num_pending == 1


def test_an_aborted_request_is_cancelled_and_leaves_the_batch(loop: StepLoop[CountingCore]) -> None:
    futures = loop.submit([ask(1, 100_000), ask(2, 100_000)])
    first, second = futures
    loop.decode([ask(3)])
    loop.abort([first])
    with pytest.raises(CancelledError):
        futures[first].result(5)
    loop.decode([ask(4)])
    assert list(loop.core.requests) == [second]
    loop.abort([second, "unknown"])
    loop.decode([ask(5)])
    assert not loop.core.requests


def test_tokens_carry_the_version_that_sampled_the_first_of_them(
    loop: StepLoop[CountingCore], gate: ServingGate
) -> None:
    (old,) = loop.submit([ask(1, 400)]).values()
    loop.decode([ask(2)])
    loop.call(gate.begin_update)
    (new,) = loop.submit([ask(3)]).values()
    gate.received("d")
    loop.call(lambda: gate.serve(7, "d"))
    assert new.result(5).weight_version == 7
    assert new.result(5).num_older_tokens == 0
    assert (old.result(5).weight_version, old.result(5).newest_version) == (0, 7)
    assert 1 <= old.result(5).num_older_tokens < 400


def test_while_weights_are_updated_nothing_is_stepped_and_nothing_is_lost(
    loop: StepLoop[CountingCore], gate: ServingGate
) -> None:
    loop.call(gate.begin_update)
    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append(loop.decode([ask(4)])[0].token_ids))
    thread.start()
    time.sleep(0.05)
    assert results == []
    gate.received("d")
    loop.call(lambda: gate.serve(1, "d"))
    thread.join(5)
    assert results == [[4, 4, 4]]


def test_jobs_run_between_steps_and_raise_to_their_caller(loop: StepLoop[CountingCore]) -> None:
    assert loop.call(threading.current_thread) is loop.core.thread
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0)
    assert loop.decode([ask(2)])[0].token_ids == [2, 2, 2]


def test_all_requests_can_be_aborted(loop: StepLoop[CountingCore]) -> None:
    caught: list[Exception] = []

    def call() -> None:
        try:
            loop.decode([ask(1, 100_000), ask(2, 100_000)])
        except RlhfError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.05)
    loop.call(lambda: loop.abort_all(RlhfError("weights refused")))
    thread.join(5)
    assert [str(error) for error in caught] == ["weights refused"]
    assert loop.core.requests == {}


def test_a_core_that_cannot_be_built_raises_in_the_constructor(gate: ServingGate) -> None:
    def build() -> CountingCore:
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        StepLoop("e", build, gate, 5)


def test_memory_that_runs_out_is_named_with_what_helps(loop: StepLoop[CountingCore]) -> None:
    for token in (-3, 1):
        with pytest.raises(MemoryExhaustedError, match=r"^e engine: out of memory: CUDA .* Lower rollout\."):
            loop.decode([ask(token)])


def test_closing_unblocks_callers(gate: ServingGate) -> None:
    loop = StepLoop("e", CountingCore, gate, 5)
    caught: list[Exception] = []

    def call() -> None:
        try:
            loop.decode([ask(1, 100_000)])
        except WorkerLostError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.05)
    loop.close(5)
    thread.join(5)
    assert "it was closed" in str(caught[0])
