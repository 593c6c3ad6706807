"""Reward 1 for a match of a regular expression."""

import logging
from collections.abc import Mapping

import regex

from rlhf.config.reward import RegexSource
from rlhf.types import Json, Prompt, Rollout

logger = logging.getLogger(__name__)


class PatternMatch:
    """1.0 if the pattern matches the response, else 0.0; also 0.0 if matching takes longer than `timeout_s`.

    The package regex checks its timeout while it matches, and lets other threads run meanwhile.
    """

    def __init__(self, section: RegexSource) -> None:
        pattern = regex.compile(section.pattern)
        self._match = pattern.search if section.match == "search" else pattern.fullmatch
        self._timeout_s = section.timeout_s

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        return None

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        try:
            return float(self._match(response, timeout=self._timeout_s) is not None)
        except TimeoutError:
            logger.warning("reward: the pattern took over %g s on a response to %s", self._timeout_s, prompt.id)
            return 0.0
