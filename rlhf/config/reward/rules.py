"""Rule-based rewards: computed from the response, without a model."""

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
    """A source that compares the response's final answer with the row's label."""

    extract: Extraction = "auto"
    """Where the final answer is: after the last ####, in the last \\boxed{}, in the last <answer> tag, the last number,
    or the whole text; auto takes the first of these that it finds. The label is read in the same way if it has such a
    mark."""


class ExactMatchSource(AnswerSource):
    """1 if the final answer equals the label, ignoring surrounding white space."""

    type: Literal["exact-match"] = "exact-match"
    """Equal text."""
    casefold: bool = False
    """Ignore upper and lower case."""
    whitespace: bool = True
    """Treat any run of white space as one space."""
    punctuation: bool = False
    """Ignore periods and commas at the end."""


class ChoiceSource(AnswerSource):
    """1 if the response chooses the letter that is the label."""

    type: Literal["choice"] = "choice"
    """Multiple choice."""
    num_choices: int = Field(10, ge=2, le=26)
    """Number of choices; the first is A."""
    first_label: Literal["A", "0", "1"] = "A"
    """Label of the first choice: labels may be numbers."""


class NumberSource(AnswerSource):
    """1 if the final answer is the label's number. Thousands separators and currency signs are ignored."""

    type: Literal["number"] = "number"
    """Equal numbers."""
    tolerance: NonNegativeFloat = 1e-6
    """Largest absolute difference that counts as equal."""
    relative_tolerance: NonNegativeFloat = 0.0
    """Largest difference that counts as equal, as a share of the label."""
    percent: Literal["ignore", "divide"] = "ignore"
    """Whether 50% is 50 or 0.5."""


class MathSource(AnswerSource):
    """1 if the final answer is mathematically equal to the label, checked by a verifier for LaTeX in child
    processes."""

    type: Literal["math"] = "math"
    """Equal expressions."""
    timeout_s: PositiveFloat = 5.0
    """Longest time for one response; one that takes longer counts as wrong."""
    memory_gib: PositiveFloat = 2.0
    """Most memory that a verifier process may allocate."""
    num_processes: PositiveInt = 2
    """Verifier processes in parallel."""


class FormatSource(SourceSection):
    """1 if the response first thinks, between <think> and </think>, and then answers."""

    type: Literal["format"] = "format"
    """Thinking, then an answer."""
    weight: FiniteFloat = 0.1
    """Factor in the total reward."""
    answer_tag: bool = False
    """Require <answer> and </answer> around what follows the thinking."""


class LengthSource(SourceSection):
    """A penalty that grows by a constant for each response token beyond a limit."""

    type: Literal["length"] = "length"
    """Linear length penalty."""
    limit: NonNegativeInt | None = None
    """Response tokens without penalty; by default half of rollout.max_response_tokens."""
    per_token: PositiveFloat = 0.001
    """Penalty of each further token."""


class OverlongSource(SourceSection):
    """DAPO's soft overlong punishment (Yu et al. 2025): 0 up to limit - buffer tokens, then linearly to -1 at limit."""

    type: Literal["overlong"] = "overlong"
    """Soft overlong punishment."""
    limit: PositiveInt | None = None
    """Length of the longest response, in tokens; by default rollout.max_response_tokens."""
    buffer: PositiveInt | None = None
    """Tokens over which the penalty grows; by default a fifth of the limit."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.limit is not None and self.buffer is not None and self.buffer > self.limit:
            raise ValueError(f"buffer: {self.buffer} > limit {self.limit}.")
        return self


class RegexSource(SourceSection):
    """1 if a regular expression matches the response."""

    type: Literal["regex"] = "regex"
    """Regular expression."""
    pattern: str
    """In the syntax of the Python package regex."""
    match: Literal["search", "full"] = "search"
    """Whether it may match anywhere (search), or must match the whole response (full)."""
    timeout_s: PositiveFloat = 0.5
    """Longest time for one response; one that takes longer counts as no match."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}.") from error
        return pattern


class EnvironmentSource(SourceSection):
    """What tools and the environment of rollout.environment gave: the sum of the rewards of all turns, and of
    reward()."""

    type: Literal["environment"] = "environment"
    """Rewards of the environment."""


PureSource: TypeAlias = (
    ExactMatchSource
    | ChoiceSource
    | NumberSource
    | FormatSource
    | LengthSource
    | OverlongSource
    | RegexSource
    | EnvironmentSource
)
"""Rules that are fast and start nothing. They are computed in the driver."""
