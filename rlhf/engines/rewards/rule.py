"""Rules: fast, deterministic scores of single responses."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from rlhf.errors import DataError
from rlhf.types import Json, Prompt, Reward, Rollout


class Rule(Protocol):
    """Scores one response at a time."""

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        """Why responses to a row cannot be scored, e.g. `has no label`; None if they can."""
        ...

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        """The score of a response to a prompt whose row has no problem. Every text has a score."""
        ...


class RuleReward:
    """A rule as a reward source. Raises DataError if a row lacks what the rule needs."""

    def __init__(self, rule: Rule, name: str) -> None:
        self._rule = rule
        self._name = name

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        for prompt in prompts:
            require_usable_row(self._rule, self._name, prompt)
        items = zip(prompts, responses, rollouts, strict=True)
        return [Reward(total=self._rule.score(*item)) for item in items]

    def close(self) -> None:
        """Nothing to close."""


class RowRequirement(Protocol):
    """What a source requires of a row."""

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None: ...


def require_usable_row(need: RowRequirement, name: str, prompt: Prompt) -> None:
    """Raise DataError if the prompt's row lacks what the source called `name` needs."""
    problem = need.row_problem(prompt.label, prompt.metadata)
    if problem is not None:
        raise DataError(row_line(prompt.id, name, problem))


def row_line(row_id: str, name: str, problem: str) -> str:
    """One line about a row that a source cannot score."""
    return f"data: row {row_id} {problem} (reward {name})."


def label_problem(label: str | None) -> str | None:
    """Why a label cannot be compared with; None if it can."""
    if label is None:
        return "has no label; set data.label_key to the column of the correct answer"
    return None if label.strip() else "has an empty label"
