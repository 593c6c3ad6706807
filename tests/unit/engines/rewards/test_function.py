"""The user's reward function: what it gets, what it may return, and every way in which it fails."""

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.engines.base import RewardSource
from rlhf.engines.rewards import FunctionReward, check_function
from rlhf.errors import ConfigError, RewardError
from tests.unit.engines.rewards.reward_support import evaluate, prompts, responses, rollouts

Open = Callable[..., FunctionReward]

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a function's body as the user's module and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str, signature: str = "prompts, responses, **columns") -> str:
        lines = body.splitlines()
        text = "\n".join(["import os, time", f"def score({signature}):", *(f"    {line}" for line in lines)])
        (tmp_path / "rewards.py").write_text(text + "\n")
        return "rewards:score"

    return write


@pytest.fixture
def open_reward(module: Callable[..., str]) -> Iterator[Open]:
    opened: list[FunctionReward] = []

    def open_one(body: str, signature: str = "prompts, responses, **columns", **options: Any) -> FunctionReward:
        opened.append(FunctionReward(module(body, signature), **options))
        return opened[-1]

    yield open_one
    for reward in opened:
        reward.close()


def scores(source: RewardSource, count: int = 3) -> list[float]:
    return [reward.total for reward in source.score(prompts(count), responses(count), rollouts(count))]


def test_a_function_scores_prompts_and_responses_in_their_order(open_reward: Open) -> None:
    reward = open_reward("return [float(len(r)) + int(p[-1]) / 10 for p, r in zip(prompts, responses)]")
    assert scores(reward) == [1.0, 2.1, 3.2]
    assert scores(reward, 1) == [1.0]
    assert scores(reward, 0) == []


def test_zero_is_a_score(open_reward: Open) -> None:
    assert scores(open_reward("return [0.0, 0, -0.0]")) == [0.0, 0.0, 0.0]


def test_columns_reach_a_function_that_accepts_them(open_reward: Open) -> None:
    rows = prompts(2, level=[3, 4], topic=["a", None])
    sent = (rows, responses(2), rollouts(2))
    everything = open_reward("return [len(columns), *map(float, columns['labels'])][:2]")
    assert [reward.total for reward in everything.score(*sent)] == [3.0, 0.0]
    one = open_reward("return level", signature="prompts, completions, level, other=None")
    assert [reward.total for reward in one.score(*sent)] == [3.0, 4.0]
    none = open_reward("return [1, 1]", signature="prompts, responses")
    assert [reward.total for reward in none.score(*sent)] == [1.0, 1.0]


def test_a_column_that_the_rows_do_not_have_is_named(open_reward: Open) -> None:
    reward = open_reward("return [1.0]", signature="prompts, responses, topic")
    with pytest.raises(
        ConfigError,
        match=r"^reward\.function: rewards:score needs topic, .* \(have labels, level\)\. Write def score\(",
    ):
        reward.score(prompts(1, level=[1]), ["x"], rollouts(1))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("result = [1 / (len(r) - 2) for r in responses]", "<string>:1 ZeroDivisionError: division by zero on p1"),
        ("raise SystemExit(3)", "<string>:1 SystemExit: 3 on p0"),
        ("raise KeyboardInterrupt", "<string>:1 KeyboardInterrupt on p0"),
        ("import json\n\njson.loads('{')", "<string>:3 JSONDecodeError: Expecting property name"),
        ("input()", "<string>:1 EOFError: EOF when reading a line on p0"),
        ("os._exit(3)", "exited with code 3 on p0..p2"),
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV on p0..p2"),
    ],
)
def test_a_function_that_fails_is_named_with_place_and_prompt(
    evaluator: FunctionReward, body: str, complaint: str
) -> None:
    with pytest.raises(RewardError) as error:
        evaluate(evaluator, body, 3)
    assert str(error.value).startswith(f"reward: {complaint}")
    assert str(error.value).endswith(" (2 of 2 tries).")


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "9 ** 9 ** 9",
        "import subprocess\nsubprocess.run(['sleep', '60'])",
        "os.kill(os.getpid(), 19)",
    ],
)
def test_a_function_that_takes_too_long_is_killed_with_all_that_it_started(open_reward: Open, body: str) -> None:
    reward = open_reward(body, timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"^reward: took over 0\.2 s on p0\.\.p2 \(2 of 2 tries\)\. Fix the "):
        scores(reward)
    assert time.monotonic() - start < 8
    reward.close()
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "user_code.py" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize(("end", "complaint"), [("time.sleep(60)", "took over"), ("os._exit(3)", "exited with code 3")])
def test_processes_that_an_ended_function_leaves_behind_are_killed(
    open_reward: Open, tmp_path: Path, end: str, complaint: str
) -> None:
    file = tmp_path / "pid"
    start = f"import subprocess\nopen({str(file)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    with pytest.raises(RewardError, match=complaint):
        scores(open_reward(f"{start}\n{end}", timeout_s=0.5))
    status = Path(f"/proc/{file.read_text()}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not status.exists() or "zombie" in status.read_text()


def test_a_grandchild_that_left_the_group_cannot_make_it_hang(open_reward: Open) -> None:
    body = "if os.fork() == 0:\n    os.setsid()\n    time.sleep(5)\n    os._exit(0)\nos._exit(1)"
    reward = open_reward(body, timeout_s=3.0)
    start = time.monotonic()
    with pytest.raises(RewardError, match="exited with code 1"):
        scores(reward)
    assert time.monotonic() - start < 4.5


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    with open({file!r}, 'w') as file:
        file.write(str(os.getpid()))
    time.sleep(60)
while not (os.path.exists({file!r}) and open({file!r}).read()):
    time.sleep(0.01)
{then}
"""


def is_gone(pid: str) -> bool:
    """Whether a process ends within five seconds."""
    status = Path(f"/proc/{pid}/status")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if "zombie" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("then", ["return [1.0] * 3", "time.sleep(60)", "os._exit(3)", "os.kill(os.getpid(), 11)"])
def test_a_daemon_of_a_function_does_not_outlive_it(open_reward: Open, tmp_path: Path, then: str) -> None:
    file = tmp_path / "pid"
    reward = open_reward(DAEMON.format(file=str(file), then=then), timeout_s=1.0)
    if then.startswith("return"):
        assert scores(reward) == [1.0] * 3
    else:
        with pytest.raises(RewardError):
            scores(reward)
    reward.close()
    assert is_gone(file.read_text())


def test_a_command_left_behind_does_not_hide_the_end_of_the_function(open_reward: Open) -> None:
    with pytest.raises(RewardError, match="exited with code 3"):
        scores(open_reward("os.system('sleep 30 &')\nos._exit(3)", timeout_s=10.0))


def test_an_exception_is_placed_in_the_users_file(open_reward: Open) -> None:
    with pytest.raises(RewardError, match=r"^reward: rewards\.py:4 ZeroDivisionError: .* on p1 \(2 of 2 tries\)\.$"):
        scores(open_reward("# the shortest answer divides\nreturn [1 / (len(r) - 2) for r in responses]"))


def test_another_exception_on_one_response_alone_is_not_reported_as_the_cause(evaluator: FunctionReward) -> None:
    with pytest.raises(RewardError, match=r"ZeroDivisionError: .* on p0\.\.p2"):
        evaluate(evaluator, "assert len(responses) == 3\n1 / 0", 3)


def test_the_second_try_counts_and_so_does_the_next_batch(open_reward: Open, tmp_path: Path) -> None:
    flag = tmp_path / "tried"
    once = f"if not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w').close()\n    os._exit(1)"
    reward = open_reward(f"{once}\nreturn [1.0] * 3")
    assert scores(reward) == [1.0, 1.0, 1.0]
    flag.unlink()
    assert scores(reward) == [1.0, 1.0, 1.0]


def test_a_process_is_kept_from_batch_to_batch(open_reward: Open) -> None:
    reward = open_reward("return [float(os.getpid())]")
    assert scores(reward, 1) == scores(reward, 1) != [float(os.getpid())]


def test_what_a_function_prints_goes_to_the_log(open_reward: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    reward = open_reward(
        "print('from python')\nos.system('echo from a shell')\nos.write(1, b'raw\\n' * 2000)\nreturn [1.0]"
    )
    assert scores(reward, 1) == [1.0]
    reward.close()
    deadline = time.monotonic() + 5
    while caplog.text.count("raw") < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "rewards:score: from python" in caplog.text
    assert "rewards:score: from a shell" in caplog.text


def test_memory_can_be_limited(open_reward: Open) -> None:
    reward = open_reward("bytearray(8 << 30)\nreturn [1.0] * len(prompts)", memory_gib=0.5)
    with pytest.raises(RewardError, match=r"rewards\.py:3 MemoryError on p0"):
        scores(reward)


def test_text_of_any_kind_is_passed_unchanged(open_reward: Open) -> None:
    reward = open_reward("return [float(len(r)) for r in responses]")
    answers = ["\ud800", "日本\n", "\x00" * 5, "x" * 3_000_000]
    rewards = reward.score(prompts(4), answers, rollouts(4))
    assert [reward.total for reward in rewards] == [1.0, 3.0, 5.0, 3_000_000.0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("score = 3", "rewards:score is of type int, not a function."),
        ("class score: ...", "rewards:score is a class without __call__, not a function."),
        ("score = int", "rewards:score is a class without __call__, not a function."),
        (
            "class score:\n    def __init__(self, a): ...\n    def __call__(self, prompts, responses): ...",
            "rewards:score is a class that cannot be created without arguments (TypeError: score.__init__() missing 1 "
            "required positional argument: 'a'); name an object of it, as scorer = score(...).",
        ),
        (
            "score = max",
            "the parameters of rewards:score cannot be known; wrap it in def score(prompts, responses, labels, "
            "**columns).",
        ),
        (
            "def score(prompts): ...",
            "rewards:score(prompts): no parameter is known to get the responses. By place, prompts would get the "
            "prompts. Write def score(prompts, responses, labels, **columns).",
        ),
        ("def other(): ...", "rewards has no score."),
        ("import nothing_like_it", "rewards: rewards.py:1 ModuleNotFoundError: No module named 'nothing_like_it'."),
        ("import os\n\nos.environ['NOT_THERE_AT_ALL']", "rewards: rewards.py:3 KeyError: 'NOT_THERE_AT_ALL'."),
        ("def score(:", "rewards: SyntaxError: invalid syntax (rewards.py, line 1)."),
        ("raise SystemExit", "rewards: rewards.py:1 SystemExit."),
        ("import os\nos._exit(4)", "importing rewards:score exited with code 4."),
    ],
)
def test_a_function_that_cannot_be_used_is_a_mistake_in_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards.py").write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        check_function("rewards:score")
    assert str(error.value) == f"reward.function: {complaint}"


def test_a_module_that_is_not_there_is_named_with_the_folder() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.function: no module not_there in /.*\.$"):
        check_function("not_there:score")


def test_a_users_module_may_be_called_like_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "function.py").write_text("def score(prompts, responses): return [1.0] * len(prompts)\n")
    check_function("function:score")


def test_the_child_ends_when_the_run_is_killed(tmp_path: Path, module: Callable[..., str]) -> None:
    write = "open('pid', 'w').write(str(os.getpid()))"
    name = module(DAEMON.format(file=str(tmp_path / "daemon"), then=f"{write}\ntime.sleep(60)"))
    code = (
        "from rlhf.engines.rewards import FunctionReward\n"
        "from tests.unit.engines.rewards.reward_support import *\n"
        f"FunctionReward({name!r}).score(prompts(1), ['x'], rollouts(1))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[4])])
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    pid_file = tmp_path / "pid"
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid_file.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
    assert is_gone((tmp_path / "daemon").read_text())


def test_sources_and_data_import_nothing_heavy() -> None:
    code = (
        "import sys, rlhf.engines.rewards, rlhf.orchestrator.data\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("network", [True, False])
def test_the_network_can_be_denied(open_reward: Open, network: bool) -> None:
    if not network and subprocess.run(["unshare", "-Un", "true"], check=False).returncode:
        pytest.skip("the kernel allows no user namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        body = f"import socket\nwith socket.socket() as s:\n    return [s.connect_ex({server.getsockname()!r})] * 3"
        assert scores(open_reward(body, network=network)) == [0.0 if network else float(errno.ECONNREFUSED)] * 3
