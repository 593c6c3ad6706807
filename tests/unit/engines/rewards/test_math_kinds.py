"""Labels of every kind, in files: each equals itself in every form, and nothing that differs by a digit or a letter."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf.config.reward import ExactMatchSource, MathSource, NumberSource
from rlhf.engines.rewards import MathReward, build_rule
from rlhf.types import Prompt
from tests.unit.engines.rewards.reward_support import rollouts

pytestmark = pytest.mark.timeout(180)
FOLDER = Path(__file__).parent
LABELS = FOLDER.joinpath("math_labels.txt").read_text().splitlines()
SEPARATOR = " ||| "
FORMS = (
    "{}", r"\boxed{{{}}}", r"So it is $\boxed{{{}}}$.", "#### {}", "<answer>{}</answer>", "The answer is {}.",
    r"The final answer is: \boxed{{{}}}",
)  # fmt: skip
EQUAL_NEIGHBORS = {r"\binom{5}{3}", r"{5 \choose 3}"}
"""Differ from their label by a digit, and are equal to it."""


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    source = MathReward(MathSource(num_processes=2, timeout_s=10.0))
    yield source
    source.close()


def scores(source: MathReward, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    rows = [Prompt(id="q7", token_ids=np.array([1]), text="question", label=label) for label, _ in pairs]
    found = source.score(rows, [text for _, text in pairs], rollouts(1) * len(pairs))
    return {pair: one.total for pair, one in zip(pairs, found, strict=True)}


def part(number: int) -> list[list[str]]:
    """The rows of one part of the file of pairs."""
    text = FOLDER.joinpath("math_pairs.txt").read_text()
    return [line.split(SEPARATOR) for line in re.split(r"^# .*\n", text, flags=re.MULTILINE)[number].splitlines()]


def neighbors(label: str) -> Iterator[str]:
    """The label with one digit changed, and with a letter changed in one of its words."""
    for found in re.finditer(r"\d", label):
        yield f"{label[: found.start()]}{(int(found[0]) + 1) % 10}{label[found.end() :]}"
    for found in re.finditer(r"(?<![\\a-zA-Z{])[A-Za-z]{3,}", label):
        place = found.start() + 1
        yield f"{label[:place]}{'k' if label[place] in 'zZ' else 'z'}{label[place + 1 :]}"


def test_a_label_of_any_kind_equals_itself_in_every_form(reward: MathReward) -> None:
    found = scores(reward, [(label, form.format(label)) for label in LABELS for form in FORMS])
    assert [pair for pair, score in found.items() if score != 1.0] == []


def test_a_label_of_any_kind_differs_from_its_neighbors(reward: MathReward) -> None:
    changed = [(label, other) for label in LABELS for other in neighbors(label) if other not in EQUAL_NEIGHBORS]
    assert len(changed) > 600
    found = scores(reward, [(label, rf"\boxed{{{other}}}") for label, other in changed])
    assert [pair for pair, score in found.items() if score != 0.0] == []


def test_answers_that_mean_the_same_are_equal_and_others_are_not(reward: MathReward) -> None:
    for number, expected in ((1, 1.0), (2, 0.0)):
        pairs = [(a, rf"\boxed{{{b}}}") for pair in part(number) for a, b in (pair, pair[::-1])]
        assert [pair for pair, score in scores(reward, pairs).items() if score != expected] == []


def test_the_final_answer_of_a_response_is_found(reward: MathReward) -> None:
    rows = [(label, response, float(score)) for label, response, score in part(3)]
    found = scores(reward, [(label, response) for label, response, _ in rows])
    assert [row for row in rows if found[row[0], row[1]] != row[2]] == []


@pytest.mark.parametrize(
    ("label", "response", "expected"),
    [
        (r"-\frac{3}{4}", r"\boxed{-0.75}", 1.0),
        (r"-\frac{3}{4}", r"\boxed{\frac{3}{4}}", 0.0),
        ("1/2", "The answer is 1/2.", 1.0),
        ("2", "The answer is 1/2.", 0.0),
        ("3 million", "3,000,000", 1.0),
        ("3 million", "3", 0.0),
        (r"3 \times 10^8", "300000000", 1.0),
        ("8", r"It is 3 \times 10^8", 0.0),
        ("1024", r"\boxed{2^{10}}", 1.0),
        ("10", "It is 2^{10}.", 0.0),
        ("0.001", "10^{-3}", 1.0),
        ("2\u00bd", "2.5", 1.0),
        ("2", "2\u00bd", 0.0),
        ("1 000", "The answer is 1 000.", 1.0),
        ("0", "1 000", 0.0),
        ("1_000", r"\boxed{1000}", 1.0),
        ("5", r"\boxed{5\pi}", 0.0),
        ("5", r"\boxed{\sqrt{5}}", 0.0),
        ("5", r"It is 5\pi", 0.0),
        ("5", r"\boxed{5!}", 0.0),
        ("5", "The answer is 5!", 1.0),
        ("6", r"\boxed{\pm 6}", 0.0),
    ],
)
def test_a_number_is_the_value_of_what_is_written(label: str, response: str, expected: float) -> None:
    row = Prompt(id="q7", token_ids=np.array([1]), text="question", label=label)
    assert build_rule(NumberSource()).score(row, response, rollouts(1)[0]) == expected


@pytest.mark.parametrize(
    ("label", "response", "expected"),
    [
        ("Paris", r"\boxed{\text{Paris}}", 1.0),
        (r"\text{Paris}", "Paris", 1.0),
        ("Paris", r"\boxed{\text{Rome}}", 0.0),
        ("Paris", r"\boxed{\text{Paris} x}", 0.0),
    ],
)
def test_words_inside_a_formula_are_the_words(label: str, response: str, expected: float) -> None:
    row = Prompt(id="q7", token_ids=np.array([1]), text="question", label=label)
    assert build_rule(ExactMatchSource()).score(row, response, rollouts(1)[0]) == expected
