"""Reward 1 for an answer that is mathematically equal to the label."""

import logging
import re
from collections.abc import Mapping, Sequence

from rlhf.config.reward import Extraction, MathSource
from rlhf.engines.rewards.answers import after_thinking, find_answer
from rlhf.engines.rewards.child_pool import ChildPool, call_with
from rlhf.engines.rewards.numerals import last_number_text
from rlhf.engines.rewards.rule import label_problem, require_usable_row
from rlhf.errors import RewardError
from rlhf.types import Json, Prompt, Reward, Rollout

logger = logging.getLogger(__name__)

FUNCTION = "rlhf.engines.rewards.math_child:equal"
CONTROL = ("1", "1.0")
"""An equality that every working child confirms."""
MAX_CHARS = 500
MAX_DEPTH = 20
"""Parsing time grows with the cube of the nesting depth; a longer or deeper answer counts as wrong."""

# No space inside the dollars, and no digit after them, which would be a price.
MATH = re.compile(
    r"(?<!\\)\$(?![\s$])([^$\n]{1,500})(?<![\s\\])\$(?![0-9])|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


class MathRequirement:
    """Labels that contain an answer."""

    def __init__(self, section: MathSource) -> None:
        self._how = section.extract

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        if (problem := label_problem(label)) is not None:
            return problem
        text = label or ""
        return None if self.answer(text) else f'has a label without a final answer ("{text[:40]}")'

    def answer(self, label: str) -> str:
        """The answer in a label, without dollar signs: extracted as from a response, else the whole label."""
        found = final_formula(label, self._how)
        return bare(label if found is None else found)


class MathReward:
    """1.0 if the final answer equals the label by the library math-verify, else 0.0.

    Without any mark the final answer is the last formula in dollars or brackets, or the whole text if it is only a
    formula, or the last number. Expressions are compared in child processes: one that takes longer than `timeout_s`
    counts as wrong. Raises DataError for a row without a label, RewardError if the children do not work at all.
    """

    def __init__(self, section: MathSource) -> None:
        self._how = section.extract
        self._name = section.label
        self._need = MathRequirement(section)
        self._pool = ChildPool(
            FUNCTION,
            num_processes=section.num_processes,
            timeout_s=section.timeout_s,
            memory_gib=section.memory_gib,
        )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        for prompt in prompts:
            require_usable_row(self._need, self._name, prompt)
        pairs = [self._pair(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        known = {
            (label, answer): float(label == answer)
            for label, answer in pairs
            if label == answer or not (is_readable(label) and is_readable(answer))
        }
        known |= self._compared([pair for pair in dict.fromkeys(pairs) if pair not in known])
        return [Reward(total=known[pair]) for pair in pairs]

    def close(self) -> None:
        self._pool.close()

    def _pair(self, prompt: Prompt, response: str) -> tuple[str, str]:
        """The label's answer and the response's, without dollar signs; empty if there is none."""
        text = after_thinking(prompt.text, response)
        answer = None if text is None else final_formula(text, self._how)
        return self._need.answer(prompt.label or ""), bare(answer or "")

    def _compared(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        verdicts = self._pool.evaluate([call_with(labels=label, answers=answer) for label, answer in pairs])
        failed = [verdict for verdict in verdicts if verdict.score is None]
        if failed:
            logger.warning(
                "reward %s: %d answers count as wrong: verifying one %s", self._name, len(failed), failed[0].failure
            )
            (control,) = self._pool.evaluate([call_with(labels=CONTROL[0], answers=CONTROL[1])])
            if control.score != 1.0:
                raise RewardError(f"reward {self._name}: verifying {CONTROL[0]} = {CONTROL[1]} {control.failure} too.")
        return {pair: verdict.score or 0.0 for pair, verdict in zip(pairs, verdicts, strict=True)}


def final_formula(text: str, how: Extraction) -> str | None:
    """The final answer by its marks, else the last formula, else the whole text if it is a formula, else the last
    number."""
    found = find_answer(text, how)
    if found is not None or how != "auto":
        return found
    formulas = list(MATH.finditer(text))
    if formulas:
        return next(group for group in formulas[-1].groups() if group)
    whole = text.strip()
    if len(whole) <= MAX_CHARS and "\n" not in whole and WORD.search(whole) is None:
        return whole
    return last_number_text(text)


def bare(text: str) -> str:
    """A formula without its delimiters."""
    text = text.strip().removesuffix(".").strip()
    formula = MATH.fullmatch(text)
    return text.replace("$", "").strip() if formula is None else next(g for g in formula.groups() if g).strip()


def is_readable(text: str) -> bool:
    """Whether the text can be parsed in bounded time: not empty, not too long, brackets not nested too deeply."""
    if not text or len(text) > MAX_CHARS:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest <= MAX_DEPTH
