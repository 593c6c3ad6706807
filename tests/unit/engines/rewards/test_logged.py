"""What a reward function reports by `rlhf.log`, from its own process to the metrics of a step and of an evaluation."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf
from rlhf.engines.rewards import FunctionReward, Weighted, WeightedRewards
from rlhf.errors import RewardError
from rlhf.orchestrator.evaluation import describe_samples
from rlhf.orchestrator.step.sampled_metrics import logged_means
from rlhf.reward_log import TAKEN, take
from rlhf.types import Reward
from tests.unit.engines.rewards.reward_support import prompts, responses, rollouts

pytestmark = pytest.mark.timeout(60)

FUNCTIONS = """
import asyncio
import threading

import rlhf


def several(prompts, responses):
    for response in responses:
        rlhf.log("length", len(response))
    rlhf.log("calls", True)
    thread = threading.Thread(target=rlhf.log, args=("from/thread", 7))
    thread.start()
    thread.join()
    return [0.0 for _ in responses]


async def each(prompt, response):
    await asyncio.sleep(0)
    rlhf.log("length", len(response))
    return 1.0


def sometimes(prompts, responses):
    if len(responses) > 2:
        rlhf.log("many", len(responses))
    return [0.0 for _ in responses]


def fails(prompts, responses):
    rlhf.log("before_it_failed", 1.0)
    if len(responses) == 2:
        raise ValueError("two")
    return [0.0 for _ in responses]


def misnamed(prompts, responses):
    rlhf.log("mean", 1.0)
    return [0.0 for _ in responses]


def silent(prompts, responses):
    return [0.0 for _ in responses]
"""


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Scored"]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logging_rewards.py").write_text(FUNCTIONS)
    scored = Scored()
    yield scored
    scored.close()


class Scored:
    """Scores by one of the functions after another, each in a process of its own."""

    def __init__(self) -> None:
        self._open: dict[str, FunctionReward] = {}

    def __call__(self, function: str, count: int) -> list[Reward]:
        return self.source(function).score(prompts(count), responses(count), rollouts(count))

    def source(self, function: str) -> FunctionReward:
        if function not in self._open:
            self._open[function] = FunctionReward(f"logging_rewards:{function}")
        return self._open[function]

    def close(self) -> None:
        for source in self._open.values():
            source.close()


def test_what_a_call_logged_belongs_to_each_of_its_responses(scored: Scored) -> None:
    rewards = scored("several", 3)
    assert [reward.logged for reward in rewards] == [{"length": 2.0, "calls": 1.0, "from/thread": 7.0}] * 3


def test_async_functions_log_too(scored: Scored) -> None:
    assert scored("each", 4)[0].logged == {"length": 2.5}


def test_a_later_call_does_not_repeat_it(scored: Scored) -> None:
    assert scored("sometimes", 3)[0].logged == {"many": 3.0}
    assert scored("sometimes", 2)[0].logged == {}
    assert scored("silent", 2)[0].logged == {}


def test_what_a_failed_call_logged_is_forgotten(scored: Scored) -> None:
    with pytest.raises(RewardError, match="two"):
        scored("fails", 2)
    assert scored("fails", 1)[0].logged == {"before_it_failed": 1.0}


def test_the_name_of_a_metric_of_the_run_is_refused(scored: Scored) -> None:
    with pytest.raises(RewardError, match=r"logging_rewards.py:\d+ ValueError: rlhf.log: the run logs reward/mean"):
        scored("misnamed", 1)


def test_the_sum_of_sources_keeps_what_each_logged(scored: Scored) -> None:
    names = ("several", "sometimes")
    total = WeightedRewards({name: Weighted(source=scored.source(name), weight=1.0) for name in names})
    (first, *_) = total.score(prompts(3), responses(3), rollouts(3))
    assert first.logged == {"length": 2.0, "calls": 1.0, "from/thread": 7.0, "many": 3.0}


def test_a_metric_is_the_mean_over_the_responses_whose_call_logged_it() -> None:
    rewards = [Reward(total=0.0, logged=logged) for logged in ({"a": 1.0}, {"a": 4.0, "b": 2.0}, {"a": 4.0}, {})]
    assert logged_means(rewards) == {"a": 3.0, "b": 2.0}
    found = describe_samples(rollouts(4), rewards)
    assert (found["eval/reward/a"], found["eval/reward/b"]) == (3.0, 2.0)


@pytest.mark.parametrize("name", ["", "a b", "-x", "a" * 101, "mean", "source/function", "é"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^rlhf\.log: "):
        rlhf.log(name, 1.0)
    assert take() == {}


def test_values_that_are_no_numbers() -> None:
    with pytest.raises(TypeError):
        rlhf.log("x", "1.0")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        rlhf.log("x", None)  # type: ignore[arg-type]
    rlhf.log("x", float("nan"))
    rlhf.log("x", 3)
    assert take() == {"x": 3.0}
    assert take() == {}


def test_every_metric_of_a_run_with_sampled_responses_is_a_taken_name() -> None:
    page = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split("\n## Responses")[0]
    named = set(re.findall(r"^\| `reward/(\w+)`", section, re.MULTILINE))
    assert named == TAKEN
