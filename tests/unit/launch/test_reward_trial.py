"""Reward functions are called on real rows before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import rlhf
from rlhf.config.commands import OnlineConfig
from rlhf.errors import ConfigError, RewardError
from rlhf.launch.check import try_rewards

pytestmark = pytest.mark.timeout(60)

Try = Callable[..., str]

OTHER_SYSTEMS = """
def queries_prompts_labels(queries, prompts, labels):
    return [float(len(query) - len(prompt)) for query, prompt in zip(queries, prompts)]


def completions_ground_truth(completions, ground_truth, **kwargs):
    return [1.0 if truth in completion else 0.0 for completion, truth in zip(completions, ground_truth)]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "zoo" and extra_info == {"split": "train"}
    return {"score": float(ground_truth in solution_str), "length": len(solution_str)}


async def waiting(completions, answer, **kwargs):
    import asyncio
    await asyncio.sleep(0)
    return [float(right == text) for text, right in zip(completions, answer)]


async def each(prompt, completion, answer):
    return completion == answer if prompt else None


class Callable:
    async def __call__(self, prompts, responses, **columns):
        return [len(response) for response in responses]


class Configured:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, responses):
        return [self.factor * len(response) for response in responses]


configured = Configured(2)
skips = lambda responses: [None for _ in responses]


def swapped(answers, prompts): return [0.0] * len(prompts)
def needy(completions, level): return [0.0] * len(completions)
def raises(prompts, responses): return [1 / (len(response) - 3) for response in responses]
def short(prompts, responses): return [1.0]
def scalar(prompts, responses): return 1.0
def sorts(prompts, responses):
    responses.sort()
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Try:
    """The line about a function, called on rows that have these columns beside a prompt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(OTHER_SYSTEMS)

    def attempt_one(function: str, **columns: object) -> str:
        rows = [{"prompt": f"say fox {n}", **columns} for n in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        given = {"policy.model": "m", "data.path": "rows.jsonl", "reward.function": f"theirs:{function}"}
        config = rlhf.load_config("grpo", settings=given)
        assert isinstance(config, OnlineConfig)
        (line,) = try_rewards(config)
        return line

    return attempt_one


@pytest.mark.parametrize(
    ("function", "columns", "shown"),
    [
        ("queries_prompts_labels", {"label": "fox"}, 'Row rows.jsonl:1: its label "fox" scores 3, "No." scores 3'),
        ("completions_ground_truth", {"label": "fox"}, 'its label "fox" scores 1, "No." scores 0'),
        ("completions_ground_truth", {"ground_truth": "fox"}, 'its label "fox" scores 1, "No." scores 0'),
        (
            "compute_score",
            {"data_source": "zoo", "reward_model": {"ground_truth": "fox"}, "extra_info": {"split": "train"}},
            '"Yes." scores 0 (length 4), "No." scores 0 (length 3)',
        ),
        ("waiting", {"answer": "fox"}, 'its label "fox" scores 1, "No." scores 0'),
        ("each", {"answer": "fox"}, 'its label "fox" scores 1, "No." scores 0'),
        ("Callable", {}, '"Yes." scores 4, "No." scores 3'),
        ("configured", {}, '"Yes." scores 8, "No." scores 6'),
        ("skips", {}, '"Yes." scores None, "No." scores None'),
    ],
)
def test_functions_of_other_systems_get_what_their_names_say(
    attempt: Try, function: str, columns: dict[str, object], shown: str
) -> None:
    assert shown in attempt(function, **columns)


def test_the_line_says_what_each_parameter_gets(attempt: Try) -> None:
    line = attempt("queries_prompts_labels", label="fox")
    assert "theirs:queries_prompts_labels gets queries = prompts + responses, prompts, labels. Row" in line


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        ("swapped", ConfigError, "answers may mean the policy's responses or the rows' reference answers"),
        ("needy", ConfigError, r"needs level, which the rows do not have \(have label, labels, messages\)"),
        ("compute_score", ConfigError, "needs data_source, which the rows do not have"),
        ("Configured", ConfigError, "cannot be created without arguments"),
        ("OTHER", ConfigError, "theirs has no OTHER"),
        ("raises", RewardError, r"theirs\.py:\d+ ZeroDivisionError: .* on rows\.jsonl:1"),
        ("short", RewardError, "got 1 scores for 4 samples"),
        ("scalar", RewardError, r"returned float, need a list of 4 numbers \(to get one response at a time"),
        ("sorts", RewardError, "changed the order of the list responses"),
    ],
)
def test_what_cannot_work_is_found_before_anything_starts(
    attempt: Try, function: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        attempt(function, label="fox")


def test_text_of_rows_cannot_move_the_cursor(attempt: Try) -> None:
    assert r'its label "\x1b[2Jfox" scores 1' in attempt("completions_ground_truth", label="\x1b[2Jfox")
