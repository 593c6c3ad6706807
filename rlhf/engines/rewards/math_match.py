"""Reward 1 for an answer that is mathematically equal to the label."""

import logging
import re
from collections.abc import Mapping, Sequence

from rlhf.config.reward import Extraction, MathSource
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.answers import after_thinking, find_answer
from rlhf.engines.rewards.child_pool import ChildPool, call_with
from rlhf.engines.rewards.math_text import normal, plain_key, words
from rlhf.engines.rewards.numerals import last_number_text
from rlhf.engines.rewards.rule import label_problem, require_usable_row
from rlhf.errors import RewardError
from rlhf.repair import Repaired
from rlhf.types import Json, Prompt, Reward, Rollout

logger = logging.getLogger(__name__)

FUNCTION = "rlhf.engines.rewards.math_child:judge"
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
WORDS_OF_SENTENCE = 3
"""A label with this many words around its formula is a sentence, whose answer is the formula."""
ANNOUNCED = re.compile(
    r"\banswers?[*_]*\s*(?:is|are|:|=)\s*:?[*_]*([^\n]{1,500}?)(?:\.(?![\w.\\])|$|\n)", re.IGNORECASE
)
CHOICE = re.compile(r"\(?[A-J](?:[).:].*)?")
BETWEEN = re.compile(r"\b(?:and|or)\b")
YES_OR_NO = re.compile(r"(yes|no|true|false)[,.!;:]\s", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[a-zA-Z\d)])[.!?]\s+|\n")
DENIAL = re.compile(r"\b(?:not|no|never|neither|nor|than|except|without)\b|n't\b", re.IGNORECASE)
BEHIND_WORD = re.compile(r"[A-Za-z]{2,}[:,]?\s*\u241f?\s*$")
NUMBER = re.compile(r"[-+]?[\d.,]+%?")
COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w*\}|\\[a-zA-Z]+")
MAX_WORDS = 12
"""An unmarked response of one line with more words is prose."""
UNREAD = "unread"
UNJUDGED = Reward(total=0.0, parts={UNREAD: 1.0})
WRONG = Reward(total=0.0, parts={UNREAD: 0.0})
RIGHT = Reward(total=1.0, parts={UNREAD: 0.0})


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
        """The answer in a label: inside its mark, the formula of a sentence, else the whole label."""
        found = find_answer(label, self._how)
        if found is not None:
            return found
        formulas = list(MATH.finditer(label))
        outside = [word for word in WORD.findall(MATH.sub(" ", label)) if word.lower() not in ("and", "or")]
        return content(formulas[-1]) if formulas and len(outside) >= WORDS_OF_SENTENCE else label.strip()


class MathReward:
    """1.0 if the final answer equals the label, else 0.0.

    Without any mark the final answer is the last formula in dollars or brackets, or the whole text if it is only a
    formula, or the last number. Answers are compared in child processes (`math_compare`, and the library math-verify
    for formulas): one that takes longer than `timeout_s` counts as wrong. The part `unread` is 1 for an answer that got
    0 because it, or its label, could not be read. Raises DataError for a row without a label, RewardError if the
    children do not work at all.
    """

    def __init__(self, section: MathSource, *, repaired: Repaired = log_repair) -> None:
        self._how = section.extract
        self._name = section.label
        self._need = MathRequirement(section)
        self._pool = ChildPool(
            FUNCTION,
            num_processes=section.num_processes,
            timeout_s=section.timeout_s,
            memory_gib=section.memory_gib,
            repaired=repaired,
        )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        for prompt in prompts:
            require_usable_row(self._need, self._name, prompt)
        pairs = [self._pair(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        known = {pair: reward for pair in pairs if (reward := at_once(*pair)) is not None}
        known |= self._compared([pair for pair in dict.fromkeys(pairs) if pair not in known])
        return [known[pair] for pair in pairs]

    def close(self) -> None:
        self._pool.close()

    def _pair(self, prompt: Prompt, response: str) -> tuple[str, str]:
        """The label's answer and the response's; empty if there is none."""
        label = self._need.answer(prompt.label or "")
        text = after_thinking(prompt.text, response)
        return label, (final_answer(text, self._how, label) or "").strip() if text is not None else ""

    def _compared(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Reward]:
        verdicts = self._pool.evaluate([call_with(labels=label, answers=answer) for label, answer in pairs])
        failed = [verdict for verdict in verdicts if verdict.score is None]
        if failed:
            logger.warning(
                "reward %s: %d answers count as wrong: verifying one %s", self._name, len(failed), failed[0].failure
            )
            (control,) = self._pool.evaluate([call_with(labels=CONTROL[0], answers=CONTROL[1])])
            if control.score != 1.0:
                raise RewardError(f"reward {self._name}: verifying {CONTROL[0]} = {CONTROL[1]} {control.failure} too.")
        return {
            pair: UNJUDGED if verdict.score is None else Reward(total=verdict.score, parts=verdict.parts)
            for pair, verdict in zip(pairs, verdicts, strict=True)
        }


def at_once(label: str, answer: str) -> Reward | None:
    """The reward where no child has to compare: without an answer, for equal texts, for text that takes too long."""
    if not answer:
        return WRONG
    if label == answer:
        return RIGHT
    if not is_readable(answer) or not is_readable(label):
        return UNJUDGED
    return RIGHT if plain_key(normal(label)) == plain_key(normal(answer)) else None


def final_answer(text: str, how: Extraction, label: str) -> str | None:
    """The final answer of a response. Without a mark it is what `unmarked_answer` finds, else the last formula."""
    if how != "auto" or find_answer(text, how) is not None:
        return final_formula(text, how)
    whole = text.strip()
    if len(whole) > MAX_CHARS and whole != label:
        return final_formula(text, how)
    if whole == label or plain_key(normal(whole)) == plain_key(normal(label)):
        return label
    if not is_readable(label) or MATH.search(whole) is not None:
        return final_formula(text, how)
    return unmarked_answer(whole, label) or final_formula(text, how)


def unmarked_answer(whole: str, label: str) -> str | None:
    """What follows `the answer is`, if that is a formula, a choice, or the label has words; what a sentence ends with,
    if that is the label; all of a short response, if the label has words."""
    has_words = bool(words(normal(label)) or WORD.search(COMMAND.sub(" ", label)))
    announced = [found[1].strip(" *_") for found in ANNOUNCED.finditer(whole)]
    if announced and (has_words or WORD.search(COMMAND.sub(" ", announced[-1])) is None):
        return announced[-1]
    if announced and CHOICE.fullmatch(announced[-1]) and CHOICE.fullmatch(label):
        return announced[-1]
    if ends_with(whole, label):
        return label
    if has_words and (verdict := YES_OR_NO.match(whole)) is not None:
        return verdict[1]
    return whole if has_words and "\n" not in whole and len(whole.split()) <= MAX_WORDS else None


def ends_with(whole: str, label: str) -> bool:
    """Whether the last sentence of a response denies nothing and ends in the label, behind a word."""
    sentence = SENTENCE_END.split(whole.rstrip(" .!*_\n"))[-1]
    spelled, answer = normal(sentence), normal(label)
    if len(answer) < 2 or NUMBER.fullmatch(answer):
        return False
    key, tail = spaceless(answer), spaceless(spelled)
    if not tail.endswith(key):
        return False
    before = next((spelled[:cut] for cut in range(len(spelled), -1, -1) if spaceless(spelled[cut:]) == key), "")
    return BEHIND_WORD.search(before) is not None and DENIAL.search(before) is None


def spaceless(text: str) -> str:
    return "".join(text.split()).lower()


def final_formula(text: str, how: Extraction) -> str | None:
    """The final answer by its marks, else the last formula, else the whole text if it is a formula, else the last
    number."""
    found = find_answer(text, how)
    if found is not None or how != "auto":
        return found
    formulas = list(MATH.finditer(text))
    if formulas:
        return content(formulas[-1])
    whole = text.strip()
    if len(whole) <= MAX_CHARS and "\n" not in whole and WORD.search(BETWEEN.sub(" ", whole)) is None:
        return whole
    return last_number_text(text)


def content(formula: re.Match[str]) -> str:
    """A formula without its delimiters."""
    return next(group for group in formula.groups() if group)


def is_readable(text: str) -> bool:
    """Whether the text can be parsed in bounded time: not empty, not too long, brackets not nested too deeply."""
    if not text or len(text) > MAX_CHARS:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest <= MAX_DEPTH
