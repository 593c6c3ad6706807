"""Reward 1 for the label's number."""

from collections.abc import Mapping
from fractions import Fraction

from rlhf.config.reward import NumberSource
from rlhf.engines.rewards.answers import after_thinking, find_answer, reference_answer
from rlhf.engines.rewards.numerals import last_number, single_number
from rlhf.engines.rewards.rule import label_problem
from rlhf.types import Json, Prompt, Rollout


class NumberMatch:
    """1.0 if the final answer's number equals the label's within the tolerance, else 0.0.

    A marked answer must contain one number; several different ones count as none. Without any mark the last number
    counts.
    """

    def __init__(self, section: NumberSource) -> None:
        self._section = section
        self._divide = section.percent == "divide"

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        if (problem := label_problem(label)) is not None:
            return problem
        return None if self._expected(label) is not None else f'has a label without one number ("{(label or "")[:40]}")'

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        text = after_thinking(prompt.text, response)
        given = None if text is None else self._given(text)
        expected = self._expected(prompt.label)
        if given is None or expected is None:
            return 0.0
        section = self._section
        allowed = max(Fraction(section.tolerance), Fraction(section.relative_tolerance) * abs(expected))
        return float(abs(given - expected) <= allowed)

    def _given(self, text: str) -> Fraction | None:
        found = find_answer(text, self._section.extract)
        if found is not None:
            return single_number(found, divide_percent=self._divide)
        return last_number(text, divide_percent=self._divide) if self._section.extract == "auto" else None

    def _expected(self, label: str | None) -> Fraction | None:
        answer = reference_answer(label or "", self._section.extract)
        return single_number(answer, divide_percent=self._divide)
