"""Where rewards come from."""

import ipaddress
import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

from rlhf.config.base import Section
from rlhf.config.models import ModelSection


def is_link_local(address: str) -> bool:
    """Whether an IP address is one of the link-local ones, which serve a cloud machine's own secrets."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_link_local


def is_private(address: str) -> bool:
    """Whether an IP address belongs to this machine or a private network."""
    return ipaddress.ip_address(address.partition("%")[0]).is_private


def literal_address(url: str) -> str | None:
    """The URL's host, where it is an IP address rather than a name."""
    host = urlsplit(url).hostname or ""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f'scheme must be http or https (got "{parts.scheme}").')
    if not parts.hostname:
        raise ValueError(f'no host in the address (got "{url}").')
    if parts.username or parts.password:
        raise ValueError("no credentials in the address; name an environment variable by auth_env.")
    address = literal_address(url)
    if address is not None and is_link_local(address):
        raise ValueError("link-local address refused.")
    return url


def _checked_plain_http(url: str) -> None:
    address = literal_address(url)
    if url.lower().startswith("http:") and address is not None and not is_private(address):
        raise ValueError("url: plain http to a non-private host; use https, or a source with allow_plain_http.")


def _checked_function(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is None:
        raise ValueError(f'need module:name (got "{name}").')
    return name


Url = Annotated[str, AfterValidator(_checked_url)]
FunctionName = Annotated[str, AfterValidator(_checked_function)]


class SourceSection(Section):
    """One named source of rewards."""

    type: str
    """Kind of the source."""
    name: str = ""
    """Name in the logs; by default the type."""
    weight: FiniteFloat = 1.0
    """Factor in the total reward."""

    @property
    def label(self) -> str:
        """What the source is called in logs and metrics."""
        return self.name or self.type


class ModelSource(SourceSection, ModelSection):
    """A reward model: a scalar head on the last token."""

    type: Literal["model"] = "model"
    """A reward model."""


class FunctionSource(SourceSection):
    """The user's own Python function, run in a child process."""

    type: Literal["function"] = "function"
    """A Python function."""
    function: FunctionName
    """module:name of a function (prompts, responses, **columns) -> list of floats."""
    timeout_s: PositiveFloat = 60.0
    """Longest time one batch may take."""
    memory_gib: PositiveFloat | None = None
    """Most memory that the function's process may allocate."""


class HttpSource(SourceSection):
    """A reward service."""

    type: Literal["http"] = "http"
    """An HTTP endpoint."""
    url: Url
    """http(s) address that takes POST {ids, prompts, responses} and answers {ids, scores}."""
    auth_env: str | None = None
    """Environment variable that holds the bearer token; the token itself never stands in a config."""
    allow_plain_http: bool = False
    """Allow http:// to a public host."""
    ca_file: str | None = None
    """Certificate authority to trust, as a PEM file."""
    batch_size: PositiveInt = 32
    """Answers in one request."""
    max_concurrency: PositiveInt = 4
    """Requests in flight at once."""
    connect_timeout_s: PositiveFloat = 5.0
    """Longest wait for a connection."""
    read_timeout_s: PositiveFloat = 60.0
    """Longest wait for a reply."""
    outage_timeout_s: PositiveFloat = 600.0
    """Longest time over which a request that failed in transport or with 408, 429 or 5xx is retried."""

    @model_validator(mode="after")
    def _plain_http_stays_inside(self) -> Self:
        if not self.allow_plain_http:
            _checked_plain_http(self.url)
        return self


Source = Annotated[ModelSource | FunctionSource | HttpSource, Field(discriminator="type")]


class RewardSection(ModelSection):
    """Where rewards come from: exactly one of model, function, url or sources.

    With `model`, the other model fields (dtype, num_gpus_per_node, ...) say how it runs.
    """

    function: FunctionName | None = None
    """module:name of a Python function (prompts, responses, **columns) -> list of floats."""
    url: Url | None = None
    """Address of a reward service."""
    sources: tuple[Source, ...] = ()
    """Several named sources with weights; the reward is their weighted sum."""

    @model_validator(mode="after")
    def _given_once(self) -> Self:
        values = {"model": self.model, "function": self.function, "url": self.url, "sources": self.sources or None}
        given = [name for name, value in values.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; set one, or list them all under sources.")
        if self.url is not None:
            _checked_plain_http(self.url)
        return self

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
