"""Reward 1 for the label's letter."""

import re
import string
from collections.abc import Mapping

from rlhf.config.reward import ChoiceSource
from rlhf.engines.rewards.answers import after_thinking, find_answer, reference_answer
from rlhf.engines.rewards.rule import label_problem
from rlhf.types import Json, Prompt, Rollout

BEFORE_LETTER = r"(?:\\(?:text|mathrm|mathbf|textbf)\s?\{|[\s(\[{*_$\"'])*"
"""What may come before a letter that is an answer by itself."""


class Choice:
    """1.0 where the answer chooses the label's letter, else 0.0.

    A marked answer is a letter, alone or before the text of the choice (`B) Paris`). Without any mark it is what
    follows the last `answer is` or `answer:`, or a letter alone in the last line. Several letters are no answer.
    """

    def __init__(self, section: ChoiceSource) -> None:
        self._section = section
        letters = string.ascii_uppercase[: section.num_choices]
        # A lowercase letter, or an I before a word, is usually a word and not a choice.
        lower = rf"[{letters.lower()}](?=[)\].:}}]|\s*$)"
        upper = rf"(?!I\s+[a-z])[{letters}]"
        several = rf"(?![)\]}}*\s]*(?:,|/|&|or\b|and\b)\s*\(?[{letters}]\b)"
        self._letter = re.compile(rf"{BEFORE_LETTER}({upper}|{lower})(?![^\W_]|['\u2019]){several}")
        self._alone = re.compile(rf"{BEFORE_LETTER}([{letters}{letters.lower()}])[\s)\]}}*_$.:\"']*")
        self._announced = re.compile(r"answer\s*(?:is|:|=)\s*(?::|option\b|choice\b)?", re.IGNORECASE)
        self._letters = letters

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        if (problem := label_problem(label)) is not None:
            return problem
        if self._expected(label or "") is not None:
            return None
        first = self._section.first_label
        last = self._letters[-1] if first == "A" else str(int(first) + len(self._letters) - 1)
        return f'has the label "{(label or "")[:40]}", need {first} to {last}'

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        text = after_thinking(prompt.text, response)
        given = None if text is None else self._given(text)
        return float(given is not None and given == self._expected(prompt.label or ""))

    def _given(self, text: str) -> str | None:
        found = find_answer(text, self._section.extract)
        if found is not None:
            return self._first_letter(found)
        if self._section.extract != "auto":
            return None
        announced = list(self._announced.finditer(text))
        if announced:
            return self._first_letter(text[announced[-1].end() :])
        last_line = text.strip().rpartition("\n")[2]
        alone = self._alone.fullmatch(last_line) or self._option(last_line)
        return None if alone is None else alone[1].upper()

    def _option(self, line: str) -> re.Match[str] | None:
        """`B) Paris` or `(B) Paris`; a letter without punctuation may be an article."""
        match = self._letter.match(line)
        return match if match is not None and line[match.end() : match.end() + 1] in (")", ".", ":", "]") else None

    def _first_letter(self, text: str) -> str | None:
        match = self._letter.match(text)
        return None if match is None else match[1].upper()

    def _expected(self, label: str) -> str | None:
        if self._section.first_label == "A":
            return self._first_letter(reference_answer(label, self._section.extract))
        text = label.strip()
        index = int(text) - int(self._section.first_label) if re.fullmatch(r"[0-9]{1,2}", text) else -1
        return self._letters[index] if 0 <= index < len(self._letters) else None
