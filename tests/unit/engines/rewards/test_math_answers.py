"""The rule math agrees with what is meant: an answer equals its label however it is written, and no neighbor does."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.reward import MathSource
from rlhf.engines.rewards import MathReward
from rlhf.engines.rewards.math_text import normal, words
from rlhf.types import Prompt
from tests.unit.engines.rewards.reward_support import rollouts

pytestmark = pytest.mark.timeout(120)
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    source = MathReward(MathSource(num_processes=2, timeout_s=10.0))
    yield source
    source.close()


def scores(source: MathReward, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The score of each response, a label first."""
    rows = [Prompt(id="q7", token_ids=np.array([1]), text="question", label=label) for label, _ in pairs]
    return [one.total for one in source.score(rows, [text for _, text in pairs], rollouts(1) * len(pairs))]


ROWS = [
    ("1331 and 1728", r"\boxed{1331 and 1728}", True),
    ("1331 and 1728", r"\boxed{1728}", False),
    (r"\text{June 20}", r"\boxed{\text{June 20}}", True),
    (r"\text{June 20}", r"\boxed{20}", False),
    ("2 hours 30 minutes", r"\boxed{2 hours 30 minutes}", True),
    ("2 hours 30 minutes", r"\boxed{30}", False),
    (r"19, 46, \text{ and } 82", r"\boxed{19, 46, \text{ and } 82}", True),
    (r"3 \text{ or } 4", r"\boxed{3 \text{ or } 4}", True),
    (r"\$5.00", r"\boxed{5}", True),
    ("5.00", r"\boxed{\$5.00}", True),
    (r"\$32,\!348", r"\boxed{32348}", True),
    ("5", r"The price is \$5", True),
    ("17", "**17**", True),
    ("17", "= 17", True),
    ("5", r"\boxed{\$5}", True),
    ("5", "The price is $5.", True),
]
SAME = [
    ("1331 and 1728", "1728, 1331"),
    (r"3 \text{ or } 4", r"\{3, 4\}"),
    (r"x=1 \text{ or } x=2", "1, 2"),
    ("(1,2), (3,4)", "(3,4) and (1,2)"),
    ("June 20", "June 20th"),
    ("June 20", r"\text{June } 20"),
    ("3:45 PM", "3:45 p.m."),
    ("2 hours 30 minutes", "150 minutes"),
    ("2 hours 30 minutes", r"2\text{ h }30\text{ min}"),
    ("5 cm", "5"),
    ("5", r"5\text{ cm}^2"),
    ("5 m^2", "5 square meters"),
    ("12 km/h", r"12\text{ km per hour}"),
    (r"x = 5 \text{ cm}", "5 cm"),
    (r"\frac{1}{2} \text{ cup}", "1/2 cup"),
    (r"90^\circ", "90 degrees"),
    ("90", r"90^\circ"),
    ("5 dollars", r"\$5"),
    (r"25\text{ apples}", "25"),
    (r"50\%", "50 percent"),
    ("50%", "0.5"),
    ("1 1/2", "1.5"),
    ("1.5", r"1\frac{1}{2}"),
    ("1000", "1 000"),
    ("1,000", r"1{,}000"),
    ("1500", "1.5e3"),
    ("1/3", r"0.\overline{3}"),
    ("(1,2)", r"\left(1,\, 2\right)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1, 2)"),
    ("1<x<3", "(1,3)"),
    (r"x \geq 3", r"[3,\infty)"),
    (r"x\in[0,1]", "[0,1]"),
    ("1:2", "2:4"),
    ("Paris", r"\text{paris}"),
    ("A", "(A)"),
    ("2 pi", r"2\pi"),
    (r"\sqrt{2}", "\u221a2"),
    ("\u00bd", "0.5"),
    ("10^3", "10\u00b3"),
    ("5m+3", "3+5m"),
    ("2xyz+1", "1+2yxz"),
]
DIFFERENT = [
    ("1331 and 1728", "1331 and 1729"),
    ("June 20", "July 20"),
    ("June 20", "jnue 20"),
    ("Paris", "Pairs"),
    ("2 hours 30 minutes", "2"),
    (r"1\text{ hour }5\text{ min}", "1"),
    ("2024-06-20", "1998"),
    ("3:45", "4:60"),
    ("5 cm", "5 m"),
    ("12 cm", "12 cm^2"),
    (r"\$5", "\u20ac5"),
    ("(3,1)", "(5,2)"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "0,1"),
    ("[0,1)", "[0,1]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"),
    ("1 000", "0"),
    ("1 1/2", "11/2"),
    ("1011_2", "1011_3"),
    ("3 R 2", "2 R 3"),
    ("25 apples", "25 oranges"),
    ("x=1, y=2", "x=2, y=1"),
    ("blue, red", "blue"),
    (r"\text{no solution}", "infinitely many solutions"),
    ("5", "June 5"),
    ("5", "5 and 6"),
]


def test_what_is_right_scores_1_and_what_is_wrong_0(reward: MathReward) -> None:
    pairs = [(label, response) for label, response, _ in ROWS]
    assert dict(zip(pairs, scores(reward, pairs), strict=True)) == {row[:2]: float(row[2]) for row in ROWS}


def test_an_answer_may_be_written_in_another_way(reward: MathReward) -> None:
    pairs = [(a, rf"\boxed{{{b}}}") for pair in SAME for a, b in (pair,)]
    assert [pair for pair, score in zip(pairs, scores(reward, pairs), strict=True) if score != 1.0] == []


def test_another_answer_is_wrong_however_close_it_looks(reward: MathReward) -> None:
    pairs = [(a, rf"\boxed{{{b}}}") for pair in DIFFERENT for a, b in (pair, pair[::-1])]
    assert [pair for pair, score in zip(pairs, scores(reward, pairs), strict=True) if score != 0.0] == []


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        (r"The distance is $\frac{3}{4}$ of a mile.", r"\frac{3}{4}"),
        ("$3$ hours and $5$ minutes", "$3$ hours and $5$ minutes"),
        ("$x=5$", "$x=5$"),
        ("72 clips", "72 clips"),
        ("so 5 + 5\n#### 10", "10"),
        (r"it is \boxed{\text{June 20}}", r"\text{June 20}"),
    ],
)
def test_a_label_is_taken_whole_unless_it_marks_its_answer(reward: MathReward, label: str, answer: str) -> None:
    assert scores(reward, [(label, rf"\boxed{{{answer}}}"), (label, label)]) == [1.0, 1.0]


def test_an_unmarked_answer_in_words_is_found(reward: MathReward) -> None:
    assert scores(
        reward,
        [
            ("June 20", "We count the days. The answer is June 20."),
            ("June 20", "The answer is June 21."),
            ("2 hours 30 minutes", "2 h 30 min"),
            ("no solution", "Answer: no solution"),
            ("no solution", "The equation has a solution and the answer is 3."),
        ],
    ) == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_answers_that_cannot_be_read_are_counted(reward: MathReward) -> None:
    rows = [Prompt(id="q7", token_ids=np.array([1]), text="question", label="72")] * 4
    given = [r"\boxed{73}", r"\boxed{??}", r"\boxed{" + "7" * 600 + "}", ""]
    rewards = reward.score(rows, given, rollouts(4))
    assert [one.total for one in rewards] == [0.0] * 4
    assert [one.parts["unread"] for one in rewards] == [0.0, 1.0, 1.0, 0.0]


MONTHS = st.sampled_from(["January", "May", "June", "October"])
NUMBERS = st.integers(min_value=-999, max_value=999)
COUNTS = st.integers(min_value=2, max_value=99)
UNITS = st.sampled_from(["cm", "m", "kg", "miles", "apples", r"\text{ cm}^2", r"\text{ km/h}", "^\\circ"])
NAMES = st.sampled_from(["Paris", "Rome", "New York", "yes", "no", "No real solutions", "blue", "Monday", "DNE"])
FRACTION = st.tuples(COUNTS, COUNTS).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[0] + pair[1]}}}")
LINE = st.tuples(NUMBERS, NUMBERS, st.sampled_from(["+", "-"])).map(lambda t: f"{t[0]}x{t[2]}{abs(t[1]) + 1}")
ENTRY = st.one_of(NUMBERS.map(str), FRACTION, LINE)


def matrix(entries: Sequence[str], columns: int) -> str:
    rows = [" & ".join(entries[start : start + columns]) for start in range(0, len(entries), columns)]
    return r"\begin{pmatrix} " + r" \\ ".join(rows) + r" \end{pmatrix}"


@st.composite
def labels_with_neighbors(draw: st.DrawFn) -> tuple[str, str]:
    """A label of any kind, and one that differs from it in one place."""
    n = draw(COUNTS)
    first, second = draw(ENTRY), draw(ENTRY)
    changed = f"{first}+1"
    return draw(
        st.sampled_from(
            [
                (f"{draw(MONTHS)} {n % 28 + 1}", f"{draw(MONTHS)} {(n + 1) % 28 + 1}"),
                (f"{n % 28 + 1}/{n % 12 + 1}/2024", f"{n % 28 + 1}/{n % 12 + 1}/2025"),
                (f"{n % 12 + 1}:{n % 50 + 10} PM", f"{n % 12 + 1}:{n % 50 + 10} AM"),
                (f"{n} hours {n % 50 + 1} minutes", f"{n} hours {n % 50 + 2} minutes"),
                (rf"{n}\text{{ days}} 3\text{{ hours}}", rf"{n}\text{{ days}} 4\text{{ hours}}"),
                (f"({first}, {second})", f"({changed}, {second})"),
                (f"({first}, {second}, {n})", f"({first}, {second})"),
                (rf"\left[{n}, {n + 5}\right)", rf"\left[{n}, {n + 5}\right]"),
                (rf"(-\infty, {n}) \cup ({n + 1}, \infty)", rf"(-\infty, {n}) \cup ({n + 2}, \infty)"),
                (rf"\{{{first}, {n}\}}", rf"\{{{changed}, {n}\}}"),
                (f"{n}, {n + 1}, {n + 3}", f"{n}, {n + 1}, {n + 4}"),
                (rf"{n} \text{{ and }} {n + 1}", f"{n + 1}"),
                (rf"\langle {first}, {second} \rangle", rf"\langle {changed}, {second} \rangle"),
                (matrix([first, second, str(n), "0"], 2), matrix([first, second, str(n + 1), "0"], 2)),
                (matrix([first, second], 1), matrix([first, changed + second.lstrip("-")], 1)),
                (f"{n}{draw(UNITS)}", f"{n + 1}{draw(UNITS)}"),
                (f"{n} {draw(UNITS)}", f"{n + 1} {draw(UNITS)}"),
                (rf"\${n:,}.50", rf"\${n:,}.51"),
                (f"{n} dollars", f"{n} euros"),
                (rf"{n}\%", rf"{n + 1}\%"),
                (rf"{n}\frac{{1}}{{{n + 1}}}", rf"{n + 1}\frac{{1}}{{{n + 1}}}"),
                (f"{n} 1/{n + 10}", f"{n}1/{n + 10}"),  # with tenths, 9 1/10 would be 91/10
                (draw(NAMES), "London"),
                (rf"\text{{{draw(NAMES)}}}", r"\text{London}"),
                (f"{draw(NAMES)} and {draw(NAMES)}", "London"),
                (first, changed),
                (f"x = {first}", f"x = {changed}"),
                (rf"{n}\sqrt{{{n + 1}}}", rf"{n}\sqrt{{{n + 2}}}"),
                (f"{n}:{n + 1}", f"{n + 1}:{n}"),
                (f"{n * 1000:,}", f"{n * 1000 + 1:,}"),
                (f"{n}.{n}", f"{n}.{n}1"),
            ]
        )
    )


@MANY
@given(labels_with_neighbors())
def test_a_label_equals_itself_and_not_its_neighbor(reward: MathReward, pair: tuple[str, str]) -> None:
    label, neighbor = pair
    boxed = rf"\boxed{{{label}}}"
    forms = [label, boxed, f"So it is ${boxed}$.", f"#### {label}", f"<answer>{label}</answer>"]
    assert scores(reward, [(label, form) for form in forms]) == [1.0] * 5
    assert scores(reward, [(f"So it is ${boxed}$.", label)]) == [1.0]
    assert scores(reward, [(label, rf"\boxed{{{neighbor}}}"), (neighbor, rf"\boxed{{{label}}}")]) == [0.0, 0.0]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_normal_form(text: str) -> None:
    assert words(normal(text)) == words(normal(text))


@pytest.mark.skipif("RLHF_TEST_DATA" not in os.environ, reason="RLHF_TEST_DATA is not set")
def test_every_label_of_gsm8k_equals_itself_boxed_and_plain(reward: MathReward) -> None:
    folder = Path(os.environ["RLHF_TEST_DATA"], "data", "gsm8k")
    lines = [line for split in ("train", "test") for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    solutions = [json.loads(line)["answer"] for line in lines]
    finals = [solution.rpartition("####")[2].strip() for solution in solutions]
    pairs = [
        pair
        for solution, final in zip(solutions, finals, strict=True)
        for pair in (
            (solution, solution),
            (solution, rf"\boxed{{{final}}}"),
            (solution, final),
            (final, f"\\boxed{{\\${final}}}" if len(final) < 3 else rf"\boxed{{{final}}}"),
            (final, final),
        )
    ]
    assert len(pairs) == 5 * (7473 + 1319)
    assert set(scores(reward, pairs)) == {1.0}
