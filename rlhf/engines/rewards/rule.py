"""What a rule is: a judgment of one answer by itself, quick, and the same each time."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from rlhf.errors import DataError
from rlhf.types import Json, Prompt, Reward, Rollout


class Rule(Protocol):
    """Judges one answer."""

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        """Why answers to a row cannot be judged, e.g. `has no label`; None where they can."""
        ...

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        """The score of an answer to a prompt whose row has no problem. Any text has one."""
        ...


class RuleReward:
    """A rule as a source of rewards. Raises DataError where a row lacks what the rule needs."""

    def __init__(self, rule: Rule, name: str) -> None:
        self._rule = rule
        self._name = name

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        for prompt in prompts:
            refuse_row(self._rule, self._name, prompt)
        items = zip(prompts, responses, rollouts, strict=True)
        return [Reward(total=self._rule.score(*item)) for item in items]

    def close(self) -> None:
        """Nothing to end."""


class RowNeed(Protocol):
    """Knows what a source needs of a row."""

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None: ...


def refuse_row(need: RowNeed, name: str, prompt: Prompt) -> None:
    """Raise DataError where the prompt's row lacks what the source called `name` needs."""
    problem = need.row_problem(prompt.label, prompt.metadata)
    if problem is not None:
        raise DataError(row_line(prompt.id, name, problem))


def row_line(row_id: str, name: str, problem: str) -> str:
    """One line about a row that a source cannot judge."""
    return f"data: row {row_id} {problem} (reward {name})."


def label_problem(label: str | None) -> str | None:
    """Why a label is no answer to compare with."""
    if label is None:
        return "has no label; set data.label_key to the column of the right answer"
    return None if label.strip() else "has an empty label"
