"""Reward sources outside this process: a user's function, a service, a judge, a sandbox that runs code."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from rlhf.config.import_name import ImportName
from rlhf.config.path_text import PathText
from rlhf.config.reward.address import Url, Variable, check_plain_http
from rlhf.config.reward.base import SourceSection


class FunctionSource(SourceSection):
    """The user's own Python function, run in a child process."""

    type: Literal["function"] = "function"
    """A Python function."""
    function: ImportName
    """module:name or file.py:name of a function (prompts, responses, labels, **columns) -> list of floats; arguments
    are given by name."""
    timeout_s: PositiveFloat = 60.0
    """Longest time for one batch."""
    memory_gib: PositiveFloat | None = None
    """Most memory that the function's process may allocate."""
    network: bool = True
    """Whether the function reaches the network; false needs user namespaces."""


class EndpointSource(SourceSection):
    """A source that is called over HTTP."""

    url: Url
    """http(s) address of the service."""
    auth_env: Variable | None = None
    """Environment variable that holds the bearer token. The token itself is never part of a config."""
    allow_plain_http: bool = False
    """Allow http:// to a public host."""
    ca_file: PathText | None = None
    """PEM file of a certificate authority to trust."""
    max_concurrency: PositiveInt = 4
    """Requests in flight at the same time."""
    connect_timeout_s: PositiveFloat = 5.0
    """Longest time to connect."""
    read_timeout_s: PositiveFloat = 60.0
    """Longest time to wait for a reply."""
    outage_timeout_s: PositiveFloat = 600.0
    """How long a request that failed in transport or with 408, 429 or 5xx is retried."""

    @model_validator(mode="after")
    def _plain_http_stays_inside(self) -> Self:
        if not self.allow_plain_http:
            check_plain_http(self.url)
        return self


class HttpSource(EndpointSource):
    """A reward service."""

    type: Literal["http"] = "http"
    """An HTTP endpoint."""
    url: Url
    """http(s) address that takes POST {ids, prompts, responses} and replies {ids, scores}."""
    batch_size: PositiveInt = 32
    """Responses in one request."""


class JudgeSource(EndpointSource):
    """A language model as a judge, behind an OpenAI-compatible chat-completions endpoint."""

    type: Literal["judge"] = "judge"
    """A judge."""
    url: Url
    """http(s) address of the endpoint with its path, e.g. http://localhost:8000/v1/chat/completions."""
    model: str
    """Name of the judging model, as the endpoint knows it."""
    mode: Literal["pairwise", "rubric"] = "pairwise"
    """pairwise compares the responses to a prompt with each other, in both orders; rubric scores each response
    alone."""
    criterion: str = "which response is more helpful, correct and harmless"
    """What the pairwise judge is asked to decide."""
    opponents: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Responses that each response is compared with, an even number; if not given, all others of its group."""
    rubric: str | None = None
    """What earns how many points, for rows without a rubric of their own."""
    rubric_key: str = "rubric"
    """Column of a row's own rubric."""
    scale: tuple[int, int] = (1, 10)
    """Lowest and highest score of the rubric; the reward is the position of a score between them, from 0 to 1."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    max_tokens: PositiveInt = 512
    """Longest reply of the judge."""
    max_tries: PositiveInt = 3
    """How often the judge is asked until its reply contains a verdict."""

    @field_validator("scale")
    @classmethod
    def _rises(cls, scale: tuple[int, int]) -> tuple[int, int]:
        if scale[0] >= scale[1]:
            raise ValueError(f"need the lowest score, then a higher one (got {list(scale)}).")
        return scale


class CodeSource(SourceSection):
    """Unit tests: the program in the response is run with the row's tests, in a sandbox that you choose."""

    type: Literal["code"] = "code"
    """Unit tests."""
    sandbox: Literal["subprocess", "command", "function"] | None = None
    """Where programs run. There is no default, because a program written by a model may do anything."""
    command: tuple[str, ...] = ()
    """With sandbox command: program and arguments. It gets the Python program on its standard input."""
    function: ImportName | None = None
    """With sandbox function: module:name or file.py:name of a function (programs, markers) -> list of scores."""
    tests_key: str | None = None
    """Column of the tests: Python code, or a list of code. If not given, the label."""
    timeout_s: PositiveFloat = 10.0
    """Longest time for one program."""
    memory_gib: PositiveFloat = 1.0
    """Most memory that one program may allocate (sandbox subprocess)."""
    num_processes: PositiveInt = 2
    """Programs that run in parallel."""

    @model_validator(mode="after")
    def _sandbox_is_named(self) -> Self:
        if self.sandbox is None:
            raise ValueError(
                "sandbox: missing; programs that a model wrote run only where you say: command (recommended: a "
                "container without network), function, or subprocess (limits on time and memory, no isolation)."
            )
        if (self.sandbox == "command") != bool(self.command):
            raise ValueError(f"command: goes with sandbox command, and only with it (got sandbox {self.sandbox}).")
        if (self.sandbox == "function") != (self.function is not None):
            raise ValueError(f"function: goes with sandbox function, and only with it (got sandbox {self.sandbox}).")
        return self
