"""Where rewards come from."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from rlhf.config.import_name import ImportName
from rlhf.config.models import ModelSection
from rlhf.config.reward.address import Url, check_plain_http, is_link_local, is_private, literal_address
from rlhf.config.reward.base import SourceSection
from rlhf.config.reward.rules import (
    AnswerSource,
    ChoiceSource,
    EnvironmentSource,
    ExactMatchSource,
    Extraction,
    FormatSource,
    LengthSource,
    MathSource,
    NumberSource,
    OverlongSource,
    PureSource,
    RegexSource,
)
from rlhf.config.reward.services import CodeSource, EndpointSource, FunctionSource, HttpSource, JudgeSource

__all__ = [
    "AnswerSource",
    "ChoiceSource",
    "CodeSource",
    "EndpointSource",
    "EnvironmentSource",
    "ExactMatchSource",
    "Extraction",
    "FormatSource",
    "FunctionSource",
    "HttpSource",
    "JudgeSource",
    "LengthSource",
    "MathSource",
    "ModelSource",
    "NumberSource",
    "OverlongSource",
    "PrmSource",
    "PureSource",
    "RegexSource",
    "RemoteSource",
    "RewardSection",
    "RuleName",
    "Source",
    "SourceSection",
    "StartedSource",
    "Url",
    "is_link_local",
    "is_private",
    "literal_address",
]


class ModelSource(SourceSection, ModelSection):
    """A reward model: a scalar head on the last token."""

    type: Literal["model"] = "model"
    """A reward model."""


class PrmSource(SourceSection, ModelSection):
    """A process reward model: a scalar head at the end of each step."""

    type: Literal["prm"] = "prm"
    """A process reward model."""
    step_separator: str = Field("\n", min_length=1)
    """Text that ends each step of a response, as data.step_separator when the model was trained."""
    aggregate: Literal["min", "mean", "product", "last"] = "min"
    """How the probabilities that the steps are right become one reward. A response without a step gets 0."""


StartedSource: TypeAlias = ModelSource | PrmSource
"""Sources whose model the run starts."""

RemoteSource: TypeAlias = FunctionSource | HttpSource | JudgeSource | MathSource | CodeSource
"""Sources that wait for other processes. Each runs in an actor of its own."""

Source: TypeAlias = StartedSource | RemoteSource | PureSource

RuleName: TypeAlias = Literal["exact-match", "choice", "number", "math", "format", "length", "overlong"]

RULES: Mapping[
    RuleName,
    type[ExactMatchSource | ChoiceSource | NumberSource | MathSource | FormatSource | LengthSource | OverlongSource],
] = {
    "exact-match": ExactMatchSource,
    "choice": ChoiceSource,
    "number": NumberSource,
    "math": MathSource,
    "format": FormatSource,
    "length": LengthSource,
    "overlong": OverlongSource,
}


class RewardSection(ModelSection):
    """Where rewards come from: exactly one of model, function, url, rules or sources.

    With `model`, the other model fields (dtype, num_gpus_per_node, ...) say how it runs.
    """

    function: ImportName | None = None
    """module:name or file.py:name of a Python function (prompts, responses, labels, **columns) -> list of floats;
    arguments are given by name."""
    url: Url | None = None
    """Address of a reward service."""
    rules: tuple[RuleName, ...] = ()
    """Rule-based rewards with their default settings and weights: exact-match, choice, number, math, format, length,
    overlong."""
    sources: tuple[Annotated[Source, Field(discriminator="type")], ...] = ()
    """Several named sources with weights; the reward is their weighted sum."""
    call_size: NonNegativeInt = 0
    """Responses that one call of the sources waits for; 0: a call begins as soon as a group is complete, with
    all that are. The responses to one prompt always share a call. Where a reward model scores and rollout.max_lag is 0,
    a call gets the whole step."""
    call_wait_s: NonNegativeFloat = 1.0
    """Longest wait for call_size responses, in seconds."""
    concurrency: PositiveInt = 1
    """Calls of the sources at the same time. Functions, services, judges and verifiers then have as many processes."""

    @model_validator(mode="after")
    def _given_once(self) -> Self:
        values = {
            "model": self.model,
            "function": self.function,
            "url": self.url,
            "rules": self.rules or None,
            "sources": self.sources or None,
        }
        given = [name for name, value in values.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; set one, or list them all under sources.")
        if self.url is not None:
            check_plain_http(self.url)
        return self

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The sources, in whichever way they were given."""
        if self.model is not None:
            return (ModelSource(**self.model_dump(include=set(ModelSection.model_fields))),)
        if self.function is not None:
            return (FunctionSource(function=self.function),)
        if self.url is not None:
            return (HttpSource(url=self.url),)
        if self.rules:
            return tuple(RULES[name]() for name in self.rules)
        return self.sources

    def by_environment(self) -> Self:
        """The same rewards; where there are none, those of the environment."""
        return self if self.all_sources else self.model_copy(update={"sources": (EnvironmentSource(),)})

    def for_answers_of(self, max_tokens: int) -> Self:
        """The same rewards with every default filled in that depends on the longest response."""
        if not (self.rules or self.sources):
            return self
        sources = tuple(_sized(source, max_tokens) for source in self.all_sources)
        return self.model_copy(update={"rules": (), "sources": sources})


def _sized(source: Source, max_tokens: int) -> Source:
    if isinstance(source, LengthSource) and source.limit is None:
        return source.model_copy(update={"limit": max_tokens // 2})
    if isinstance(source, OverlongSource):
        limit = source.limit or max_tokens
        return source.model_copy(update={"limit": limit, "buffer": source.buffer or max(1, limit // 5)})
    return source
