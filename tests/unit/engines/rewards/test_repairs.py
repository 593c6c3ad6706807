"""What a reward source repairs by itself is told: real child processes, and a real service on loopback."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlhf.actors.workers import RewardWorker
from rlhf.config.reward import FunctionSource, HttpSource, JudgeSource
from rlhf.engines.process.repairs import RepairLog
from rlhf.engines.rewards import FunctionReward
from rlhf.engines.rewards.child_pool import ChildPool, call_with
from rlhf.engines.rewards.http import HttpReward
from rlhf.engines.rewards.judge import JudgeReward
from rlhf.errors import RewardError
from rlhf.repair import Repair, RepairKind
from tests.unit.engines.rewards.reward_support import GOOD, Reply, prompts, responses, rollouts, service
from tests.unit.engines.rewards.test_judge import saying

pytestmark = pytest.mark.timeout(60)

MORTAL = """\
import os, time
from pathlib import Path

def score(prompts, responses, **columns):
    if (flag := Path("{flag}")).exists():
        flag.unlink()
        {fault}
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def told() -> list[Repair]:
    return []


@pytest.fixture
def mortal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[Repair]
) -> Iterator[Callable[..., FunctionReward]]:
    """Opens a function that meets a fault in its first call."""
    monkeypatch.syspath_prepend(str(tmp_path))
    flag = tmp_path / "flag"
    flag.touch()
    opened: list[FunctionReward] = []

    def open_one(fault: str, timeout_s: float = 20.0) -> FunctionReward:
        (tmp_path / "mortal.py").write_text(MORTAL.format(flag=flag, fault=fault))
        opened.append(FunctionReward("mortal:score", timeout_s=timeout_s, repaired=told.append))
        return opened[-1]

    yield open_one
    for reward in opened:
        reward.close()


def scores(source: FunctionReward | HttpReward | JudgeReward, count: int = 3) -> list[float]:
    return [reward.total for reward in source.score(prompts(count), responses(count), rollouts(count))]


@pytest.mark.parametrize(
    ("fault", "timeout_s", "text"),
    [
        ("os._exit(9)", 20.0, "exited with code 9; its call was repeated in a new process"),
        ("os.kill(os.getpid(), 19)", 2.0, "took over 2 s; its call was repeated in a new process"),
        ("raise OSError('busy')", 20.0, "mortal.py:7 OSError: busy; its call was repeated"),
    ],
    ids=["dies", "is stopped", "raises"],
)
def test_a_function_whose_call_is_repeated(
    mortal: Callable[..., FunctionReward], told: list[Repair], fault: str, timeout_s: float, text: str
) -> None:
    reward = mortal(fault, timeout_s)
    assert scores(reward) == scores(reward) == [1.0, 2.0, 3.0]
    where = "reward mortal:score"
    assert told == [Repair(kind=RepairKind.REWARD_PROCESS, where=where, text=f"{where}: {text}")]


def test_a_process_that_ends_between_two_calls(mortal: Callable[..., FunctionReward], told: list[Repair]) -> None:
    others = set(psutil.Process().children())  # of other tests, such as multiprocessing's tracker
    reward = mortal("pass")
    scores(reward)
    (child,) = set(psutil.Process().children()) - others
    child.send_signal(signal.SIGKILL)
    while child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert scores(reward) == [1.0, 2.0, 3.0]
    (repair,) = told
    assert repair.text == (
        "reward mortal:score: its process was killed by SIGKILL between two calls and was started again"
    )


def test_a_function_that_fails_is_an_error_and_no_repair(
    mortal: Callable[..., FunctionReward], told: list[Repair]
) -> None:
    with pytest.raises(RewardError, match="exited with code 9"):
        scores(mortal("pass\n    os._exit(9)"))
    assert told == []


def test_a_stopped_verifier_and_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[Repair]) -> None:
    (tmp_path / "verifier.py").write_text(
        "import os\nfrom pathlib import Path\n"
        "def judge(labels, answers):\n"
        "    if labels == ['dies'] and not Path(answers[0]).exists():\n"
        "        Path(answers[0]).touch()\n        os._exit(9)\n"
        "    if labels == ['stops']:\n        os.kill(os.getpid(), 19)\n"
        "    return [0.5]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ChildPool("verifier:judge", num_processes=1, timeout_s=2.0, memory_gib=None, repaired=told.append)
    try:
        items = [call_with(labels=label, answers=str(tmp_path / "died")) for label in ("dies", "stops", "well")]
        assert [verdict.score for verdict in pool.evaluate(items)] == [0.5, None, 0.5]
    finally:
        pool.close()
    assert [repair.text.removeprefix("reward verifier:judge: ") for repair in told] == [
        "its process exited with code 9; it was replaced",
        "took over 2 s on one item; its process was replaced, and the item is not tried again",
    ]


def test_a_request_that_is_sent_again(told: list[Repair]) -> None:
    down, bad = Reply(status=503), Reply(body=b'{"ids": [], "scores": []}')
    with service([down, Reply(status=0), bad, GOOD]) as server:
        source = HttpSource(url=server.url, outage_timeout_s=5.0)
        reward = HttpReward(source, first_wait_s=0.01, repaired=told.append)
        assert scores(reward) == [1.0, 2.0, 3.0]
        reward.close()
        origin = server.url.removesuffix("/score")
    assert {(repair.kind, repair.where) for repair in told} == {(RepairKind.REWARD_REQUEST, origin)}
    assert [repair.text for repair in told] == [
        f"reward.url: no reply from {origin} (status 503); the request was sent again",
        f"reward.url: no reply from {origin} (Server disconnected without sending a response.); the request was sent "
        "again",
        "reward.url: got 0 scores for 3 samples (r0..r2); the request was sent again",
    ]


def test_a_judge_that_is_asked_again(told: list[Repair]) -> None:
    script = [Reply(body=b"?"), Reply(body=saying("Hm.")), Reply(body=saying("<verdict>4</verdict>"))]
    with service(script) as server:
        section = JudgeSource(url=server.url, model="m", mode="rubric", rubric="is it good?", scale=(0, 4))
        source = JudgeReward(section, first_wait_s=0.01, repaired=told.append)
        assert scores(source, 1) == [1.0]
        source.close()
    assert len(told) == 2
    assert all(repair.text.endswith("; the request was sent again") for repair in told)


def test_a_worker_gives_its_repairs_with_the_next_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ones as one, with their number."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = Path.cwd()
    flag = tmp_path / "flag"
    (tmp_path / "mortal.py").write_text(MORTAL.format(flag=flag, fault="os._exit(9)"))
    worker = RewardWorker(before, None)
    worker.start(FunctionSource(function="mortal:score", timeout_s=20.0), 1)
    sent = (prompts(2), responses(2), rollouts(2))
    try:
        flag.touch()
        rewards, repairs = worker.score(*sent)
        assert [reward.total for reward in rewards] == [1.0, 2.0]
        assert [(repair.kind, repair.count) for repair in repairs] == [(RepairKind.REWARD_PROCESS, 1)]
        assert worker.score(*sent)[1] == []
    finally:
        worker.close()


def test_equal_repairs_are_counted() -> None:
    log, once = RepairLog(), Repair(kind=RepairKind.REWARD_REQUEST, where="a", text="again")
    other = Repair(kind=RepairKind.REWARD_REQUEST, where="b", text="again")
    threads = [threading.Thread(target=log.add, args=(once,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.add(other)
    assert [(repair.where, repair.count) for repair in log.take()] == [("a", 5), ("b", 1)]
    assert log.take() == []
