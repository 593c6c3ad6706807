"""A reward function is judged by its source, which is never run."""

from pathlib import Path

import pytest

from rlhf.config.loading.user_function import problem_of

MODULE = """
import sys
raise SystemExit("this must not run")
def right(prompts, responses, **columns): ...
def named(prompts, responses, *, labels, **columns): ...
def loose(*args, **kwargs): ...
async def waits(prompts, responses, **columns): ...
def closed(prompts, responses): ...
@decorated
def wrapped(x): ...
value = make()
from elsewhere import borrowed
class Judge:
    @staticmethod
    def score(prompts, responses, **columns): ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "star.py").write_text("from rewards import *\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit\n")
    (package / "inner.py").write_text("def score(prompts, responses, **columns): ...\n")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "inner.py").write_text("def score(prompts, responses): ...\n")
    return str(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["rewards:right", "rewards:named", "rewards:loose", "rewards:wrapped", "rewards:value", "rewards:borrowed",
     "rewards:Judge.score", "rewards:closed", "rewards:waits",
     "star:anything", "package.inner:score", "plain.inner:score"],
)  # fmt: skip
def test_a_function_that_may_be_right_passes(folder: str, name: str) -> None:
    assert problem_of(name, [folder]) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:f", "no module nowhere"),
        ("package.nowhere:f", "no module package.nowhere"),
        ("rewards.inner:f", "no module rewards.inner"),
        ("rewards:missing", "defines no missing"),
        ("broken:f", "broken.py:1: invalid syntax"),
    ],
)
def test_a_function_that_cannot_be_called_is_named(folder: str, name: str, said: str) -> None:
    assert said in str(problem_of(name, [folder]))
