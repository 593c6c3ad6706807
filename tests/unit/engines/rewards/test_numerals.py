"""Mixed fractions, and powers of units, in the rule number."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.reward import NumberSource
from rlhf.engines.rewards import build_rule
from rlhf.engines.rewards.numerals import last_number, single_number
from rlhf.types import Prompt
from tests.unit.engines.rewards.reward_support import rollouts


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        (r"\boxed{1\frac{1}{2}}", "1.5", 1.0),
        (r"\boxed{1\frac{1}{2}}", "5.5", 0.0),
        (r"\boxed{12\text{ cm}^2}", "12", 1.0),
        ("\\boxed{12 cm}", "12", 1.0),
        ("1 1/2", "1.5", 1.0),
        ("1 1/2", "1", 0.0),
        (r"\boxed{1 1/2}", "5.5", 0.0),
        (r"-2\frac{3}{4}", "-2.75", 1.0),
        (r"\boxed{3 \dfrac12}", "3.5", 1.0),
        (r"\boxed{\frac12}", "0.5", 1.0),
        ("it takes 2 3/4 hours", "2.75", 1.0),
        (r"\boxed{9 m^{2}}", "9", 1.0),
        (r"\boxed{9\,\mathrm{m}^{-1}}", "9", 1.0),
        ("5 cm^2", "2", 0.0),
        ("x^2 is 9", "9", 1.0),
        (r"\boxed{3 or 1/2}", "3.5", 0.0),
    ],
)
def test_a_mixed_fraction_is_one_number(answer: str, label: str, expected: float) -> None:
    row = Prompt(id="q7", token_ids=np.array([1]), text="question", label=label)
    assert build_rule(NumberSource()).score(row, answer, rollouts(1)[0]) == expected


@given(st.integers(0, 10**6), st.integers(1, 99), st.integers(1, 99), st.sampled_from(["cm", "m", "ft"]))
def test_every_mixed_fraction_is_read_back_exactly(whole: int, part: int, more: int, unit: str) -> None:
    under = part + more
    value = whole + Fraction(part, under)
    forms = [rf"{whole}\frac{{{part}}}{{{under}}}", rf"{whole} \dfrac{{{part}}}{{{under}}}", f"{whole} {part}/{under}"]
    for form in forms:
        assert single_number(form) == last_number(f"It is {form}") == value
        assert single_number(f"-{form}") == -value
        assert single_number(rf"{form}\text{{ {unit}}}^2") == single_number(f"{form} {unit}^{{3}}") == value
