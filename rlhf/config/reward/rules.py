"""Rewards by rule: what an answer must be, judged without any model."""

from typing import Literal, Self, TypeAlias

import regex
from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rlhf.config.reward.base import SourceSection

Extraction: TypeAlias = Literal["auto", "hash", "boxed", "tag", "last-number", "whole"]


class AnswerSource(SourceSection):
    """A source that compares the final answer with the row's label."""

    extract: Extraction = "auto"
    """Where the final answer stands: after the last ####, in the last \\boxed{}, in the last <answer> tag, as the last
    number, or as the whole text; auto takes what is there. It holds for the label too, where the label has it."""


class ExactMatchSource(AnswerSource):
    """1 where the final answer is the label, letter for letter but for space around it."""

    type: Literal["exact-match"] = "exact-match"
    """Equal texts."""
    casefold: bool = False
    """Take small and capital letters as the same."""
    whitespace: bool = True
    """Take any run of white space as one space."""
    punctuation: bool = False
    """Leave out full stops and commas at the end."""


class ChoiceSource(AnswerSource):
    """1 where the answer chooses the letter that is the label."""

    type: Literal["choice"] = "choice"
    """Multiple choice."""
    num_choices: int = Field(10, ge=2, le=26)
    """How many letters there are to choose from, A first."""
    first_label: Literal["A", "0", "1"] = "A"
    """The label of the first choice: labels may be numbers."""


class NumberSource(AnswerSource):
    """1 where the final answer is the label's number; thousands separators and currency signs do not matter."""

    type: Literal["number"] = "number"
    """Equal numbers."""
    tolerance: NonNegativeFloat = 1e-6
    """Largest difference that still counts as equal."""
    relative_tolerance: NonNegativeFloat = 0.0
    """The same, as a share of the label."""
    percent: Literal["ignore", "divide"] = "ignore"
    """Whether 50% is 50 or 0.5."""


class MathSource(AnswerSource):
    """1 where the final answer is mathematically the label, by a verifier for LaTeX in child processes."""

    type: Literal["math"] = "math"
    """Equal expressions."""
    timeout_s: PositiveFloat = 5.0
    """Longest time for one answer; one that takes longer counts as wrong."""
    memory_gib: PositiveFloat = 2.0
    """Most memory that a verifying process may allocate."""
    num_processes: PositiveInt = 2
    """Processes that verify at once."""


class FormatSource(SourceSection):
    """1 where the answer thinks first, between <think> and </think>, and then answers."""

    type: Literal["format"] = "format"
    """Thinking, then an answer."""
    weight: FiniteFloat = 0.1
    """Factor in the total reward."""
    answer_tag: bool = False
    """Ask for <answer> and </answer> around what follows the thinking."""


class LengthSource(SourceSection):
    """A penalty that falls by a constant for each of the model's own tokens beyond a number of them."""

    type: Literal["length"] = "length"
    """Linear length penalty."""
    limit: NonNegativeInt | None = None
    """Tokens that cost nothing; by default half of rollout.max_response_tokens."""
    per_token: PositiveFloat = 0.001
    """What each further token costs."""


class OverlongSource(SourceSection):
    """DAPO's soft overlong punishment (Yu et al. 2025): 0 up to limit - buffer tokens, then linearly to -1 at limit."""

    type: Literal["overlong"] = "overlong"
    """Soft punishment of overlong answers."""
    limit: PositiveInt | None = None
    """Tokens of the longest answer; by default rollout.max_response_tokens."""
    buffer: PositiveInt | None = None
    """Tokens over which the punishment grows; by default a fifth of the limit."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.limit is not None and self.buffer is not None and self.buffer > self.limit:
            raise ValueError(f"buffer: {self.buffer} > limit {self.limit}.")
        return self


class RegexSource(SourceSection):
    """1 where a regular expression matches the answer."""

    type: Literal["regex"] = "regex"
    """Regular expression."""
    pattern: str
    """In the syntax of the Python package regex."""
    match: Literal["search", "full"] = "search"
    """Whether it may match anywhere, or must match the whole answer."""
    timeout_s: PositiveFloat = 0.5
    """Longest time for one answer; one that takes longer counts as no match."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}.") from error
        return pattern


PureSource: TypeAlias = (
    ExactMatchSource | ChoiceSource | NumberSource | FormatSource | LengthSource | OverlongSource | RegexSource
)
"""Rules that are quick and run nothing: judged where the loop runs."""
