"""Where rewards come from."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt

from rlhf.config.base import Section
from rlhf.config.models import ModelSection


class SourceSection(Section):
    """One named source of rewards."""

    name: str = ""
    """Name in the logs; by default the type."""
    weight: FiniteFloat = 1.0
    """Factor in the total reward."""


class ModelSource(SourceSection, ModelSection):
    """A reward model: a scalar head on the last token."""

    type: Literal["model"] = "model"
    """A reward model."""


class FunctionSource(SourceSection):
    """The user's own Python function, run in a child process."""

    type: Literal["function"] = "function"
    """A Python function."""
    function: str
    """module:name of a function (prompts, responses, **columns) -> list of floats."""
    timeout_s: PositiveFloat = 60.0
    """Longest time one batch may take."""


class HttpSource(SourceSection):
    """A reward service."""

    type: Literal["http"] = "http"
    """An HTTP endpoint."""
    url: str
    """http(s) address that takes POST {ids, prompts, responses} and answers {ids, scores}."""
    auth_env: str | None = None
    """Environment variable that holds the bearer token; the token itself never stands in a config."""
    allow_plain_http: bool = False
    """Allow http:// to a public host."""
    ca_file: str | None = None
    """Certificate authority to trust, as a PEM file."""
    batch_size: PositiveInt = 32
    """Answers in one request."""
    connect_timeout_s: PositiveFloat = 5.0
    """Longest wait for a connection."""
    read_timeout_s: PositiveFloat = 60.0
    """Longest wait for a reply."""
    max_retries: int = Field(5, ge=0)
    """Retries of a request that failed in transport or with 408, 429 or 5xx."""
    outage_timeout_s: PositiveFloat = 600.0
    """Longest time over which one request is retried."""


Source = Annotated[ModelSource | FunctionSource | HttpSource, Field(discriminator="type")]


class RewardSection(ModelSection):
    """Where rewards come from: exactly one of model, function, url or sources.

    With `model`, the other model fields (dtype, num_gpus_per_node, ...) say how it runs.
    """

    function: str | None = None
    """module:name of a Python function (prompts, responses, **columns) -> list of floats."""
    url: str | None = None
    """Address of a reward service."""
    sources: tuple[Source, ...] = ()
    """Several named sources with weights; the reward is their weighted sum."""

    @property
    def all_sources(self) -> tuple[ModelSource | FunctionSource | HttpSource, ...]:
        """The sources, however they were given."""
        if self.model is not None:
            return (ModelSource(**self.model_dump(include=set(ModelSection.model_fields))),)
        if self.function is not None:
            return (FunctionSource(function=self.function),)
        if self.url is not None:
            return (HttpSource(url=self.url),)
        return self.sources
