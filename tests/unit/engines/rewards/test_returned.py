"""What a reward function may return, and what it may do to the lists that it gets."""

import re

import pytest

from rlhf.config.reward import LengthSource
from rlhf.engines.rewards import FunctionReward, RuleReward, Weighted, WeightedRewards, build_rule
from rlhf.errors import RewardError
from tests.unit.engines.rewards.reward_support import evaluate, prompts, responses, rollouts

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(1, 2)", [1.0, 2.0]),
        ("(x for x in (1, 2))", [1.0, 2.0]),
        ("__import__('numpy').array([1.5, 2.5])", [1.5, 2.5]),
        ("__import__('numpy').array([1, 2], dtype='float32')", [1.0, 2.0]),
        ("[__import__('numpy').float32(1.5), __import__('numpy').int64(2)]", [1.5, 2.0]),
        ("[__import__('fractions').Fraction(1, 2), 2]", [0.5, 2.0]),
        ("[__import__('decimal').Decimal('0.5'), True]", [0.5, 1.0]),
        ("__import__('numpy').array([True, False])", [1.0, 0.0]),
        ("__import__('torch').tensor([0.5, 2.0], requires_grad=True)", [0.5, 2.0]),
        ("[__import__('torch').tensor(0.5), __import__('torch').tensor([2])]", [0.5, 2.0]),
    ],
)
def test_numbers_may_come_in_several_forms(evaluator: FunctionReward, expression: str, expected: list[float]) -> None:
    assert evaluate(evaluator, f"result = {expression}", 2) == expected


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("[1.0]", "got 1 scores for 2 samples (prompt ids p0, p1)."),
        ("[]", "got 0 scores for 2 samples (prompt ids p0, p1)."),
        ("[1.0, 2.0, 3.0]", "got 3 or more scores for 2 samples (prompt ids p0, p1)."),
        ("iter(float, 1.0)", "got 3 or more scores for 2 samples (prompt ids p0, p1)."),
        ("['0.5', 1.0]", 'score for p0 is not a finite number (got "0.5").'),
        ("[1.0, float('nan')]", "score for p1 is not a finite number (got NaN)."),
        ("[1.0, float('inf')]", "score for p1 is not a finite number (got inf)."),
        ("[1.0, -1e400]", "score for p1 is not a finite number (got -inf)."),
        ("[1.0, 10**400]", "score for p1 is not a finite number (got inf)."),
        ("[[1.0], 2.0]", "score for p0 is not a finite number (got list)."),
        ("[1j, 1.0]", "score for p0 is not a finite number (got complex)."),
        ("[{'points': 1.0}, 1.0]", "score for p0 is not a finite number (got dict without score (has points))."),
        ("[(1.0, 2.0), 1.0]", "score for p0 is not a finite number (got tuple)."),
        ("__import__('numpy').ones((2, 2))", "score for p0 is not a finite number (got ndarray)."),
        *(
            (
                expression,
                f"the function returned {name}, need a list of 2 numbers (to get one response at a time, name the "
                "parameters prompt, response and label).",
            )
            for expression, name in (
                ("None", "None"),
                ("1.0", "float"),
                ("'12'", "str"),
                ("{1.0, 2.0}", "set"),
                ("{'p0': 1.0, 'p1': 2.0}", "dict"),
            )
        ),
    ],
)
def test_scores_other_than_one_finite_number_for_each_response_are_rejected(
    evaluator: FunctionReward, expression: str, complaint: str
) -> None:
    with pytest.raises(RewardError, match=f"^{re.escape('reward: ' + complaint)}$"):
        evaluate(evaluator, f"result = {expression}", 2)


UNCHANGED = "result = [float(len(r)) for r in responses]"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("responses.clear()\nresult = []", "changed the list responses from 2 to 0 entries"),
        ("result = [1.0] * 2\nwhile prompts: prompts.pop()", "changed the list prompts from 2 to 0 entries"),
        ("responses.append('x')\nresult = [1.0] * 2", "changed the list responses from 2 to 3 entries"),
        ("responses.sort(key=len, reverse=True)\nresult = [1.0] * 2", "changed the order of the list responses"),
        ("code.clear()\nresult = [1.0] * 2", "changed the list code from 2 to 0 entries"),
        ("result = (float(len(responses.pop())) for _ in prompts)", "changed the list responses from 2 to 0 entries"),
    ],
)
def test_a_function_that_changes_the_lists_it_was_given_is_told_so(
    evaluator: FunctionReward, code: str, complaint: str
) -> None:
    with pytest.raises(RewardError, match=f"^reward: the function {complaint}; let it copy the list"):
        evaluate(evaluator, code, 2)


def test_entries_may_be_replaced_in_place(evaluator: FunctionReward) -> None:
    code = f"responses[:] = [r + 'x' for r in responses]\n{UNCHANGED}"
    assert evaluate(evaluator, code, 2) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("expression", "totals", "parts"),
    [
        ("[None, 1.0]", [None, 1.0], {}),
        ("__import__('numpy').array([None, 1.0], dtype=object)", [None, 1.0], {}),
        ("[{'score': 1, 'style': 0.5, 'pred': 'x'}, {'score': None}]", [1.0, None], {"style": [0.5, None]}),
        ("[(1.0, {'style': True}), (0, {})]", [1.0, 0.0], {"style": [1.0, None]}),
        ("[__import__('collections').namedtuple('R', 'score style')(1.0, 2.0), 3]", [1.0, 3.0], {"style": [2.0, None]}),
        ("{'score': [1, 2], 'style': [3, None]}", [1.0, 2.0], {"style": [3.0, None]}),
        ("([1, 2], {'style': [3, 4]})", [1.0, 2.0], {"style": [3.0, 4.0]}),
        (
            "{k: __import__('torch').tensor([1.0, 2.0]) for k in ('rewards', 'scores')} | "
            "{'extra_logs': {'style': __import__('torch').tensor([3.0, 4.0])}}",
            [1.0, 2.0],
            {"style": [3.0, 4.0], "scores": [1.0, 2.0]},
        ),
    ],
)
def test_a_function_may_leave_responses_out_and_report_parts(
    evaluator: FunctionReward, expression: str, totals: list[float | None], parts: dict[str, list[float | None]]
) -> None:
    rows = prompts(2, code=[f"result = {expression}"] * 2)
    rewards = evaluator.score(rows, responses(2), rollouts(2))
    assert [reward.total if reward.is_scored else None for reward in rewards] == totals
    names = {name for reward in rewards for name in reward.parts}
    assert {name: [reward.parts.get(name) for reward in rewards] for name in names} == parts


def test_a_response_that_one_of_several_sources_leaves_out_has_no_total(evaluator: FunctionReward) -> None:
    rows = prompts(2, code=["result = [{'score': None, 'seen': 1}, {'score': 2, 'seen': 0}]"] * 2)
    rules = RuleReward(build_rule(LengthSource(limit=2, per_token=0.5)), "length")
    total = WeightedRewards(
        {"own": Weighted(source=evaluator, weight=3.0), "short": Weighted(source=rules, weight=1.0)}
    )
    first, second = total.score(rows, responses(2), rollouts(2))
    assert not first.is_scored
    assert first.parts == {"short": 0.0, "own/seen": 1.0}
    assert (second.total, second.parts) == (5.5, {"own": 2.0, "short": -0.5, "own/seen": 0.0})
