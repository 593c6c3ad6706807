"""Rewards by rule: what earns one, and what no text can do to a rule."""

import json
import os
import time
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf.config.reward import (
    ChoiceSource,
    CodeSource,
    ExactMatchSource,
    FormatSource,
    JudgeSource,
    LengthSource,
    MathSource,
    NumberSource,
    OverlongSource,
    PureSource,
    RegexSource,
    RewardSection,
    Source,
)
from rlhf.engines.rewards import build_reward, build_rule, build_source, row_problems
from rlhf.engines.rewards.answers import find_answer
from rlhf.engines.rewards.numerals import last_number, numbers, single_number
from rlhf.errors import DataError
from rlhf.types import FinishReason, Json, Prompt, Rollout
from tests.unit.engines.rewards.reward_support import prompts, rollouts

pytestmark = pytest.mark.timeout(30)

EXACT, NUMBER, CHOICE, FORMAT = ExactMatchSource(), NumberSource(), ChoiceSource(), FormatSource()


def row(label: str | None, text: str = "question") -> Prompt:
    return Prompt(id="q7", token_ids=np.array([1]), text=text, label=label)


def rollout(length: int = 4, mask: Sequence[bool] | None = None) -> Rollout:
    return Rollout(
        id="r",
        prompt_id="q7",
        token_ids=np.arange(length),
        log_probs=np.zeros(length, dtype=np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=0,
        loss_mask=None if mask is None else np.array(mask),
    )


def score(source: PureSource, answer: str, label: str | None = None, text: str = "question") -> float:
    return build_rule(source).score(row(label, text), answer, rollout())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 + 30 = 42\n#### 42", "42"),
        ("#### 41\nno:\n#### 42 \nDone.", "42"),
        (r"so \boxed{41}, no, \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a\}b} c}", r"a\}b"),
        (r"\fbox{42}", "42"),
        ("<answer> 42 </answer>", "42"),
        (r"<answer>the sum is \boxed{42}</answer>", "42"),
        ("<answer>41</answer> <answer>42</answer>", "42"),
        # Cut off inside the mark: no answer, and not an earlier one either.
        (r"\boxed{41} and \boxed{42", ""),
        ("<answer>41</answer> <answer>42", ""),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_mark_holds_the_answer(text: str, answer: str | None) -> None:
    assert find_answer(text, "auto") == answer


@pytest.mark.parametrize(
    ("how", "answer"),
    [
        ("hash", "3"),
        ("boxed", "2"),
        ("tag", "1"),
        ("last-number", "3"),
        ("whole", r"<answer>1</answer> \boxed{2} #### 3"),
    ],
)
def test_an_answer_is_looked_for_where_the_config_says(how: str, answer: str) -> None:
    assert find_answer(r"<answer>1</answer> \boxed{2} #### 3", how) == answer  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "answer", "label", "expected"),
    [
        (EXACT, "Paris", "Paris", 1.0),
        (EXACT, " Paris\n", "Paris", 1.0),
        (EXACT, "New \n York", "New York", 1.0),
        (EXACT, "paris", "Paris", 0.0),
        (ExactMatchSource(casefold=True), "STRASSE", "straße", 1.0),
        (ExactMatchSource(punctuation=True), "Paris.", "Paris", 1.0),
        (ExactMatchSource(whitespace=False), "New  York", "New York", 0.0),
        (EXACT, "It is Paris", "Paris", 0.0),
        (EXACT, "It is <answer>Paris</answer>", "Paris", 1.0),
        (EXACT, r"\boxed{72}", "48 + 24 = 72\n#### 72", 1.0),
        (EXACT, "<think>Paris</think> Rome", "Rome", 1.0),
        (EXACT, "<think>Paris", "Paris", 0.0),
        (EXACT, "", "Paris", 0.0),
        (ExactMatchSource(extract="boxed"), "Paris", "Paris", 0.0),
        (ExactMatchSource(extract="boxed"), r"\boxed{Paris}", "Paris", 1.0),
        (ExactMatchSource(extract="whole"), "#### 4", "#### 4", 1.0),
    ],
)
def test_exact_match(section: ExactMatchSource, answer: str, label: str, expected: float) -> None:
    assert score(section, answer, label) == expected


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("#### 42", "42", 1.0),
        ("the answer is 42.", "42", 1.0),
        ("first 41, then 42 clips", "42", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        (r"\$1{,}000", "1,000", 1.0),
        ("-5", "5", 0.0),
        ("\u22125", "-5", 1.0),
        ("-$5", "-5", 1.0),
        ("10 - 5", "5", 1.0),
        ("50%", "50", 1.0),
        ("1/2", "0.5", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("1e3", "1000", 1.0),
        ("42.0000001", "42", 1.0),
        ("42.01", "42", 0.0),
        ("0.1 + 0.2 = 0.3", "0.3", 1.0),
        (".5", "1/2", 1.0),
        (r"\boxed{41 or 42}", "42", 0.0),
        (r"\boxed{41 or 42}", "41", 0.0),
        (r"\boxed{42, 42.0}", "42", 1.0),
        ("<answer>forty-two</answer> 42", "42", 0.0),
        ("1/0", "42", 0.0),
        ("", "42", 0.0),
        ("none", "0", 0.0),
        ("NaN", "0", 0.0),
        ("inf", "1e300", 0.0),
        ("Infinity", "0", 0.0),
        # Digits that are not 0-9 are no digits: a superscript read as one would make 4² forty-two.
        ("4\u00b2", "42", 0.0),
        ("\u0664\u0662", "42", 0.0),
        ("\uff14\uff12", "42", 0.0),
        ("XDY42", "42", 0.0),
    ],
)
def test_number(answer: str, label: str, expected: float) -> None:
    assert score(NUMBER, answer, label) == expected


def test_numbers_have_tolerances_and_shares() -> None:
    assert score(NumberSource(tolerance=0.5), "42.5", "42") == 1.0
    assert score(NumberSource(tolerance=0.5), "42.51", "42") == 0.0
    assert score(NumberSource(tolerance=0.0), "42.0000001", "42") == 0.0
    assert score(NumberSource(relative_tolerance=0.01), "1005", "1000") == 1.0
    # An absolute tolerance does not grow with the label: off by one is wrong, however large the number.
    assert score(NUMBER, "1000000001", "1000000000") == 0.0
    assert score(NumberSource(percent="divide"), "50%", "0.5") == 1.0
    assert score(NumberSource(percent="divide"), "50%", "50") == 0.0
    assert score(NumberSource(extract="hash"), "42", "#### 42") == 0.0


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=4), st.text(max_size=20))
def test_every_number_is_read_back_exactly(value: Decimal, around: str) -> None:
    assert single_number(f"{value:,f}") == Fraction(str(value))
    assert last_number(f"{around} is {value}") == Fraction(str(value))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1.0),
        ("b", 1.0),
        ("(B)", 1.0),
        ("**B**", 1.0),
        ("B) Paris", 1.0),
        ("The answer is B.", 1.0),
        ("Answer: (B) because A is wrong", 1.0),
        (r"\boxed{\text{B}}", 1.0),
        ("<answer>B</answer>", 1.0),
        ("A is wrong.\n\nB", 1.0),
        ("The answer is A. No, the answer is B.", 1.0),
        ("the correct answer is option B", 1.0),
        ("A", 0.0),
        ("answer is A or B", 0.0),
        ("answer is (B) or (A)", 0.0),
        ("<answer>B, C</answer>", 0.0),
        ("Both are good.", 0.0),
        ("Because it rains", 0.0),
        ("<think>B</think>", 0.0),
        ("the answer is a dog", 0.0),
        ("", 0.0),
    ],
)
def test_choice(answer: str, expected: float) -> None:
    assert score(CHOICE, answer, "B") == expected


def test_a_word_is_no_choice() -> None:
    assert score(CHOICE, "the answer is a dog", "A") == 0.0
    assert score(CHOICE, "The answer is I think unknown", "I") == 0.0
    assert score(ChoiceSource(num_choices=4), "E", "B") == 0.0


def test_labels_of_choices_may_be_numbers_or_whole_options() -> None:
    assert score(ChoiceSource(first_label="0"), "B", "1") == 1.0
    assert score(ChoiceSource(first_label="1"), "B", "2") == 1.0
    assert score(CHOICE, "B", "(B) Paris") == 1.0
    assert row_problems([ChoiceSource(first_label="0", num_choices=4)], [("q7", "4", {})]) == [
        'data: row q7 has the label "4", need 0 to 3 (reward choice).'
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>hm</think> 42", 1.0),
        ("\n<think>\nhm\n</think>\n\n42\n", 1.0),
        ("<think></think> 42", 0.0),
        ("<think>hm</think>  ", 0.0),
        ("<think>hm 42", 0.0),
        ("42", 0.0),
        ("so <think>hm</think> 42", 0.0),
        ("<think>a</think> b <think>c</think> d", 0.0),
        ("</think> 42 <think>hm", 0.0),
        ("", 0.0),
    ],
)
def test_format(answer: str, expected: float) -> None:
    assert score(FORMAT, answer) == expected


def test_a_template_may_have_opened_the_thinking() -> None:
    assert score(FORMAT, "hm</think> 42", text="question <think>\n") == 1.0
    assert score(FORMAT, "42", text="question <think>\n") == 0.0
    assert score(EXACT, "42", "42", text="question <think>\n") == 0.0


def test_format_may_ask_for_an_answer_tag() -> None:
    section = FormatSource(answer_tag=True)
    assert score(section, "<think>hm</think> <answer>42</answer>") == 1.0
    assert score(section, "<think>hm</think> 42") == 0.0
    assert score(section, "<think>hm</think> <answer> </answer>") == 0.0
    assert score(section, "<think><answer>1</answer></think> <answer>42</answer>") == 0.0
    assert score(section, "<think>hm</think> <answer>42</answer> and more") == 0.0


def test_length_counts_tokens_that_the_model_wrote() -> None:
    rule = build_rule(LengthSource(limit=4, per_token=0.5))
    assert rule.score(row(None), "any", rollout(4)) == 0.0
    assert rule.score(row(None), "any", rollout(7)) == -1.5
    # Five of these came from a tool.
    assert rule.score(row(None), "any", rollout(7, [True, True] + [False] * 5)) == 0.0


def test_the_overlong_punishment_is_that_of_its_paper() -> None:
    rule = build_rule(OverlongSource(limit=20, buffer=4))
    punished = [rule.score(row(None), "any", rollout(length)) for length in (0, 16, 17, 18, 20, 21, 100)]
    assert punished == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert rule.score(row(None), "any", rollout(100, [True] * 18 + [False] * 82)) == -0.5


def test_regex() -> None:
    assert score(RegexSource(pattern=r"\d+ clips"), "I have 72 clips.") == 1.0
    assert score(RegexSource(pattern=r"\d+ clips", match="full"), "I have 72 clips.") == 0.0
    assert score(RegexSource(pattern=r"(?i)yes", match="full"), "YES") == 1.0


def test_a_match_that_would_never_end_counts_as_none() -> None:
    start = time.monotonic()
    assert score(RegexSource(pattern=r"(a|a|aa)+$", timeout_s=0.2), "a" * 5000 + "b") == 0.0
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize("pattern", ["(", "[a", "(?P<n>a)(?P<n", "*"])
def test_a_pattern_is_checked_with_the_config(pattern: str) -> None:
    with pytest.raises(ValidationError, match="not a regular expression"):
        RegexSource(pattern=pattern)


HOSTILE = {
    "empty": "",
    "spaces": " " * 100_000,
    "long": "the answer is maybe " * 5_000,
    "digits": "7" * 100_000,
    "groups": "1,000" + ",000" * 25_000,
    "separators": "1," * 50_000,
    "fractions": "1/" * 50_000,
    "signs": "-" * 100_000,
    "exponents": "1e999" * 20_000,
    "tower": "9**9**9**9",
    "huge": "1e99999999999999999999",
    "open braces": r"\boxed{" * 15_000,
    "braces": r"\boxed{" + "{" * 50_000 + "}" * 50_000,
    "brackets": "(" * 100_000,
    "tags": "<answer>" * 12_000,
    "thinking": "<think>" * 14_000 + "</think>" * 12_000,
    "hashes": "#" * 100_000,
    "answers": "answer is " * 10_000,
    "dollars": "$" * 100_000,
    "code": "__import__('os').system('touch owned')",
    "nul": "\x00" * 1000,
    "surrogate": "\ud800 42",
    "digits of the world": "".join(map(chr, range(0x660, 0x66A))) * 1000,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("section", [EXACT, NUMBER, CHOICE, FORMAT, NumberSource(extract="last-number")], ids=str)
def test_no_text_breaks_a_rule_or_earns_anything(section: PureSource, answer: str) -> None:
    start = time.monotonic()
    assert score(section, answer, "B" if section.type == "choice" else "12345") == 0.0
    assert time.monotonic() - start < 2.0


def test_numbers_are_counted_once() -> None:
    assert list(numbers("1,234 and 5/10/2024, v1.2.3")) == [1234, 5, Fraction(10, 2024)]


NEEDY: list[Source] = [EXACT, NUMBER, CHOICE, MathSource(), CodeSource(sandbox="subprocess")]


@pytest.mark.parametrize("section", NEEDY, ids=lambda section: section.type)
@pytest.mark.parametrize("label", [None, "", "  \n"])
def test_a_row_without_a_label_is_named(section: Source, label: str | None) -> None:
    (line,) = row_problems([section, FORMAT], [("q7", label, {})])
    assert line.startswith("data: row q7 has ")
    assert line.endswith(f"(reward {section.type}).")


def test_rows_that_a_rule_cannot_score_are_listed_and_counted() -> None:
    no_columns: dict[str, Json] = {}
    rows = [(f"q{index}", None if index % 2 else "seven", no_columns) for index in range(20)]
    lines = row_problems([NUMBER, JudgeSource(url="http://localhost/", model="m", mode="rubric")], rows)
    assert lines[0] == 'data: row q0 has a label without one number ("seven") (reward number).'
    assert "rubric" in lines[1]
    assert lines[-1] == "data: 35 more rows like these."
    assert row_problems([FORMAT, JudgeSource(url="http://localhost/", model="m")], rows) == []


def test_a_rule_rejects_a_row_that_it_cannot_score() -> None:
    source = build_source(NUMBER)
    with pytest.raises(DataError, match=r"row q7 has no label; set data\.label_key"):
        source.score([row(None)], ["42"], [rollout()])


def test_rules_by_name_have_their_usual_weights() -> None:
    section = RewardSection(rules=("number", "format", "overlong")).for_answers_of(20)
    assert [(source.type, source.weight) for source in section.sources] == [
        ("number", 1.0),
        ("format", 0.1),
        ("overlong", 1.0),
    ]
    reward = build_reward(section.all_sources, {})
    (scored,) = reward.score([row("42")], ["<think>hm</think> 42"], [rollout(18)])
    assert scored.parts == {"number": 1.0, "format": 1.0, "overlong": -0.5}
    assert scored.total == pytest.approx(0.6)


@pytest.mark.skipif("RLHF_TEST_DATA" not in os.environ, reason="RLHF_TEST_DATA is not set")
@pytest.mark.parametrize("section", [EXACT, NUMBER, MathSource()], ids=lambda section: section.type)
def test_gsm8k_scores_its_own_answers(section: PureSource | MathSource) -> None:
    folder = Path(os.environ["RLHF_TEST_DATA"], "data", "gsm8k")
    texts = [(folder / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "test")]
    labels = [json.loads(line)["answer"] for text in texts for line in text.splitlines()]
    assert len(labels) == 7473 + 1319
    assert row_problems([section], ((str(n), label, {}) for n, label in enumerate(labels))) == []
    source = build_source(section)
    try:
        rows = [row(label) for label in labels]
        assert {one.total for one in source.score(rows, labels, [rollout()] * len(rows))} == {1.0}
        few = rows[: 200 if section.type != "math" else 8]
        golds = [float(label.rpartition("####")[2].replace(",", "")) for label in labels[: len(few)]]
        wrong = [f"So it is\n#### {gold + 1 + index % 7:,.0f}" for index, gold in enumerate(golds)]
        assert {one.total for one in source.score(few, wrong, [rollout()] * len(few))} == {0.0}
        boxed = [rf"So it is $\boxed{{{label.rpartition('####')[2].strip()}}}$." for label in labels[: len(few)]]
        assert {one.total for one in source.score(few, boxed, [rollout()] * len(few))} == {1.0}
    finally:
        source.close()


def test_responses_are_scored_in_their_order() -> None:
    scores = build_reward([NUMBER], {}).score(prompts(3), ["0", "1", "3"], rollouts(3))
    assert [one.total for one in scores] == [1.0, 1.0, 0.0]
