"""Reward 1 for the label's text."""

import re
from collections.abc import Mapping

from rlhf.config.reward import ExactMatchSource
from rlhf.engines.rewards.answers import after_thinking, find_answer, reference_answer
from rlhf.engines.rewards.rule import label_problem
from rlhf.types import Json, Prompt, Rollout

TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
"""How words are written inside a formula."""


class ExactMatch:
    """1.0 if the final answer equals the label's, both normalized; else 0.0. Without any mark the whole text counts."""

    def __init__(self, section: ExactMatchSource) -> None:
        self._section = section

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        if (problem := label_problem(label)) is not None:
            return problem
        expected = self._normal(reference_answer(label or "", self._section.extract))
        return None if expected else f'has a label without a final answer ("{(label or "")[:40]}")'

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        text = after_thinking(prompt.text, response)
        if text is None:
            return 0.0
        how = self._section.extract
        found = find_answer(text, how)
        if found is None and how == "auto":
            found = text
        if found is None:
            return 0.0
        return float(self._normal(found) == self._normal(reference_answer(prompt.label or "", how)))

    def _normal(self, text: str) -> str:
        if (words := TEXT.fullmatch(text.strip())) is not None:
            text = words[1]
        text = " ".join(text.split()) if self._section.whitespace else text.strip()
        if self._section.punctuation:
            text = text.rstrip(" .,;!")
        return text.casefold() if self._section.casefold else text
