"""Reward 1 for a response that thinks first and then answers (DeepSeek-AI 2025)."""

from collections.abc import Mapping

from rlhf.config.reward import FormatSource
from rlhf.engines.rewards.answers import ANSWER_CLOSE, ANSWER_OPEN, CLOSE, OPEN, with_think_tag
from rlhf.types import Json, Prompt, Rollout


class ThinkFormat:
    """1.0 for `<think>` some text `</think>` some text, with these tags once each and nothing before them, else 0.0.

    With `answer_tag` what follows the thinking is one `<answer>...</answer>`.
    """

    def __init__(self, section: FormatSource) -> None:
        self._answer_tag = section.answer_tag

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        return None

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        text = with_think_tag(prompt.text, response).strip()
        if not text.startswith(OPEN) or text.count(OPEN) != 1 or text.count(CLOSE) != 1:
            return 0.0
        thinking, _, answer = text.removeprefix(OPEN).partition(CLOSE)
        answer = answer.strip()
        if self._answer_tag:
            tags = text.count(ANSWER_OPEN), text.count(ANSWER_CLOSE)
            if tags != (1, 1) or not (answer.startswith(ANSWER_OPEN) and answer.endswith(ANSWER_CLOSE)):
                return 0.0
            answer = answer.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
        return float(bool(thinking.strip()) and bool(answer.strip()))
