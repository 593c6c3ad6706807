"""The queue of batches: no wait is for ever."""

import threading

import pytest

from rlhf.errors import RewardError, StallError
from rlhf.orchestrator.run.preemption import StopRequest, StopRequestedError
from rlhf.orchestrator.step.batch_queue import BatchQueue

pytestmark = pytest.mark.timeout(20)


def test_a_trainer_without_a_batch_fails_after_its_timeout() -> None:
    with pytest.raises(StallError, match=r"the trainer waited 0\.05 s for the rollouts of step 4"):
        BatchQueue[int](take_timeout_s=0.05).take(4)


def test_the_wait_goes_on_while_there_is_progress() -> None:
    queue = BatchQueue[int](take_timeout_s=0.6)
    for number in range(1, 6):
        threading.Timer(0.3 * number, queue.mark_progress).start()
    threading.Timer(1.7, queue.put, (7,)).start()
    assert queue.take(1) == 7


def test_the_streams_error_comes_after_what_it_had_finished() -> None:
    queue = BatchQueue[int](take_timeout_s=5)
    queue.put(7)
    queue.fail(RewardError("down"))
    assert queue.take(1) == 7
    with pytest.raises(RewardError, match="down"):
        queue.take(2)


def test_close_unblocks_the_trainer() -> None:
    queue = BatchQueue[int](take_timeout_s=5)
    threading.Timer(0.05, queue.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        queue.take(1)


def test_a_stop_request_ends_the_wait_for_a_batch() -> None:
    stop = StopRequest(1.0)
    queue = BatchQueue[int](take_timeout_s=5, check=stop.check)
    threading.Timer(0.05, stop.request).start()
    with pytest.raises(StopRequestedError):
        queue.take(1)
