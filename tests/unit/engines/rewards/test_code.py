"""Programs judged by unit tests: only in a sandbox that was named, and only a program that ran to its end counts."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from rlhf.config.loading.load import load_config
from rlhf.config.reward import CodeSource
from rlhf.engines.rewards import CodeReward, row_problems
from rlhf.engines.rewards.unit_tests import CodeRequirement, program_in
from rlhf.errors import ConfigError, DataError, RewardError
from rlhf.types import Json, Prompt
from tests.unit.engines.rewards.reward_support import rollouts

pytestmark = pytest.mark.timeout(60)

TESTS = "assert double(2) == 4\nassert double(-1) == -2"
GOOD = "```python\ndef double(x):\n    return 2 * x\n```"


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    source = CodeReward(CodeSource(sandbox="subprocess", timeout_s=5.0, memory_gib=0.5))
    yield source
    source.close()


def scores(source: CodeReward, answers: list[str], label: str | None = TESTS, **columns: Json) -> list[float]:
    row = Prompt(id="q7", token_ids=np.array([1]), text="Write double(x).", label=label, metadata=columns)
    return [one.total for one in source.score([row] * len(answers), answers, rollouts(len(answers)))]


def test_no_program_runs_without_a_sandbox() -> None:
    with pytest.raises(ValidationError, match="sandbox: missing; programs that a model wrote run only where you say"):
        CodeSource()
    with pytest.raises(ConfigError) as error:
        load_config("grpo", ["--data.path", "x", "--policy.model", "m", "--reward.sources", "[{type: code}]"])
    assert str(error.value).startswith("--reward.sources.0.sandbox: missing; programs that a model wrote run only")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sandbox": "command"}, "command: goes with sandbox command"),
        ({"sandbox": "subprocess", "command": ["docker"]}, "command: goes with sandbox command"),
        ({"sandbox": "function"}, "function: goes with sandbox function"),
        ({"sandbox": "subprocess", "function": "a:b"}, "function: goes with sandbox function"),
    ],
)
def test_a_sandbox_has_its_own_settings(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        CodeSource.model_validate(settings)


WRONG = {
    "wrong": "def double(x):\n    return x + 2",
    "exits early": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "no program": "I cannot do that.",
    "empty": "",
    "swallows the tests": 'double = lambda x: 2 * x\ntests = """',
    "continues into the tests": "double = lambda x: 2 * x\nif False: \\",
    "comments on the tests": "raise SystemExit  # ",
    "forever": "while True: pass",
    "too much memory": "x = bytearray(2 * 10**9)\ndouble = lambda x: 2 * x",
    "too much output": "double = lambda x: 2 * x\nwhile True: print('x' * 10**6)",
    "a large file": "double = lambda x: 2 * x\nopen('f', 'wb').write(bytes(2**21))",
    "sleeps": "import time\ntime.sleep(60)",
    "surrogate": "\ud800",
    "nul": "\x00",
    "reads no input": "input()",
}


def test_programs_that_do_not_pass_get_nothing(reward: CodeReward) -> None:
    start = time.monotonic()
    answers = [f"```python\n{code}\n```" for code in WRONG.values()]
    assert dict(zip(WRONG, scores(reward, answers), strict=True)) == dict.fromkeys(WRONG, 0.0)
    assert time.monotonic() - start < 30.0


def test_a_program_that_passes_gets_one(reward: CodeReward) -> None:
    noisy = "```py\nprint('hello')\nprint('no newline', end='')\ndef double(x): return x + x\n```"
    later = f"First try:\n```python\ndef double(x): return x\n```\nBetter:\n{GOOD}\nDone."
    bare = "def double(x):\n    return 2 * x"
    thought = f"<think>```python\nx\n```</think>\n{GOOD}"
    assert scores(reward, [GOOD, noisy, later, bare, thought]) == [1.0] * 5
    assert scores(reward, []) == []


def test_programs_see_neither_the_environment_nor_a_folder_with_files(
    reward: CodeReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    seen = "set(os.environ) <= {'PATH', 'LANG', 'HOME', 'LC_CTYPE'} and 's3cret' not in str(os.environ)"
    code = f"import os\nassert {seen}\nassert os.listdir() == []\ndouble = lambda x: 2 * x"
    assert scores(reward, [code]) == [1.0]


def test_no_process_or_file_of_a_program_is_left(reward: CodeReward, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        f"import os, time\nif os.fork() == 0:\n    open({str(mark)!r}, 'w').write(str(os.getpid()))\n    os.close(1)\n"
    )
    code += f"    time.sleep(60)\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)\ndouble = lambda x: 2 * x"
    assert scores(reward, [code]) == [1.0]
    for _ in range(100):
        if not psutil.pid_exists(int(mark.read_text())) or psutil.Process(int(mark.read_text())).status() == "zombie":
            return
        time.sleep(0.05)
    pytest.fail("the program's child lives on")


def test_tests_come_from_a_column_as_text_or_list() -> None:
    need = CodeRequirement("tests")
    assert need.tests(None, {"tests": ["assert a", "assert b"]}) == "assert a\nassert b"
    assert need.tests(None, {"tests": "assert a"}) == "assert a"
    assert CodeRequirement(None).tests('["assert a", "assert b"]', {}) == "assert a\nassert b"
    assert CodeRequirement(None).tests("[1][0]", {}) == "[1][0]"
    bads: list[Json] = [None, [], "  ", 3, ["assert a", 3]]
    for bad in bads:
        assert need.row_problem("label", {"tests": bad}) == (
            'has no tests in its column "tests", need Python text or a list of texts'
        )
    assert len(row_problems([CodeSource(sandbox="subprocess")], [("q7", None, {})])) == 1


def test_a_row_without_tests_is_rejected(reward: CodeReward) -> None:
    with pytest.raises(DataError, match="row q7 has no tests in its label"):
        scores(reward, [GOOD], None)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes the body of the user's sandbox function and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> str:
        name = f"sandbox_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(f"def run(programs, markers):\n    {body}\n")
        return f"{name}:run"

    return write


def test_a_sandbox_may_be_a_function(sandbox: Callable[[str], str]) -> None:
    body = "return [float('double' in p and m in p) if 'pass' not in p else 1.0 for p, m in zip(programs, markers)]"
    source = CodeReward(CodeSource(sandbox="function", function=sandbox(body), num_processes=1))
    try:
        assert scores(source, [GOOD, "no"], "assert True") == [1.0, 0.0]
    finally:
        source.close()


def test_a_sandbox_may_be_a_command() -> None:
    source = CodeReward(CodeSource(sandbox="command", command=(sys.executable, "-"), timeout_s=20.0))
    try:
        assert scores(source, [GOOD, "no"]) == [1.0, 0.0]
    finally:
        source.close()


@pytest.mark.parametrize("command", ["false", "cat"])
def test_a_sandbox_that_cannot_run_anything_raises_instead_of_giving_zero(command: str) -> None:
    with pytest.raises(RewardError, match="the sandbox failed on a program that does nothing"):
        CodeReward(CodeSource(sandbox="command", command=(command,)))


def test_a_sandbox_that_breaks_later_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\n[ -e {tmp_path}/broken ] && exit 1\nexec "{sys.executable}" -\n')
    script.chmod(0o755)
    source = CodeReward(CodeSource(sandbox="command", command=(str(script),), timeout_s=20.0))
    try:
        assert scores(source, [GOOD]) == [1.0]
        (tmp_path / "broken").touch()
        with pytest.raises(RewardError, match="reward code: the sandbox failed on a program that does nothing"):
            scores(source, [GOOD])
    finally:
        source.close()


def test_a_users_sandbox_may_give_partial_scores(sandbox: Callable[[str], str]) -> None:
    body = "return [1.0 if 'pass' in p else 7.0 for p in programs]"
    source = CodeReward(CodeSource(sandbox="function", function=sandbox(body), num_processes=1))
    try:
        with pytest.raises(RewardError, match="a score outside 0 to 1"):
            scores(source, [GOOD])
    finally:
        source.close()


def test_the_program_is_the_last_fenced_block() -> None:
    assert program_in("", GOOD) == "def double(x):\n    return 2 * x\n"
    assert program_in("", "x = 1") == "x = 1"
    assert program_in("", "<think>```\nx\n```") == ""
    start = time.monotonic()
    program_in("", "```python\n" * 10_000)
    assert time.monotonic() - start < 2.0


def test_a_program_cannot_print_its_way_to_a_reward(reward: CodeReward) -> None:
    assert os.linesep == "\n"
    assert scores(reward, ["print('0' * 32)\nimport os; os._exit(0)"]) == [0.0]
