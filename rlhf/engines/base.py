"""The interfaces that the training loop uses; single-process engines, pools of Ray workers and fakes implement them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from rlhf.types import (
    FloatArray,
    Json,
    Message,
    Metrics,
    PackedTokens,
    Prompt,
    Reward,
    Rollout,
    RolloutRequest,
    StepReport,
    SyncReport,
    TokenIds,
    TrainBatch,
)

T = TypeVar("T")


class Tokenizer(Protocol):
    """Text to token ids and back. `stop_token_ids` end a response; `pad_token_id` is never trained on;
    `control_tokens` are the special tokens as text."""

    has_chat_template: bool
    eos_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    control_tokens: tuple[str, ...]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool = True) -> str: ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Json] = ()) -> str:
        """Apply the chat template. Raises ModelError if there is none."""
        ...

    def fingerprint(self) -> str:
        """sha256 of vocabulary, special ids and chat template. Equal for all roles that exchange token ids."""
        ...


@runtime_checkable
class PairTokenizer(Protocol):
    """Makes the tokens of a prompt and a response for an encoder that reads at most `max_tokens` (None: no limit)."""

    max_tokens: int | None

    def encode_pair(self, prompt: str, response: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        """A conversation by the tokenizer's chat template; None if it has none."""
        ...

    def fingerprint(self) -> str | None:
        """As `Tokenizer.fingerprint`; None for a tokenizer that no policy could have."""
        ...


class RolloutEngine(Protocol):
    """Samples responses. An engine serves only a complete, verified version of the weights. Thread-safe."""

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """Ask for one response to each request. Future i belongs to request i, and ends by itself: with its rollout, or
        with the error of an engine that is lost, stuck or has no complete weights. It never waits for the others. No
        two requests to the same engine may have the same id: an aborted one may still give its response, under its id.

        `await asyncio.wrap_future(future)` waits for one in a coroutine, `generate` below for all.
        """
        ...

    def abort(self, request_ids: Collection[str]) -> None:
        """Cancel the futures of these requests, where they have not ended: nobody wants their responses any more."""
        ...

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """Log-probs [T] at temperature 1 of given tokens under the served weights; 0 for each sequence's first."""
        ...

    def sleep(self) -> None:
        """Release GPU memory until `wake` (sleep mode), for a colocated trainer."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def generate(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """One rollout for each request, in the order of the requests. Raises the first error, and then aborts the others.

    It has no deadline of its own: each future that an engine gives ends by itself.
    """
    return gather(engine.submit(requests), lambda late: engine.abort([requests[index].id for index in late]))


def gather(futures: Sequence[Future[T]], abort: Callable[[Sequence[int]], None]) -> list[T]:
    """The results of all futures, in their order. Raises the first error; `abort` then gets the indices of those that
    have not ended."""
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    if pending:
        abort([index for index, future in enumerate(futures) if future in pending])
        for future in done:
            future.result()
    return [future.result() for future in futures]


class TokenScorer(Protocol):
    """Runs a model forward over packed micro-batches.

    `batches` are in rank-major order: with n = len(batches) / num_ranks, rank r runs batches[r*n:(r+1)*n]. All ranks
    run the same number of micro-batches. Ranks that compute each micro-batch together (sequence parallelism) count as
    one.
    """

    num_ranks: int

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """The head's outputs for each micro-batch: [T] log-probs or values, or [S] scores."""
        ...


class EmaReferenceScorer(TokenScorer, Protocol):
    """A reference whose weights are an EMA of the policy's. Only `update_ema` changes it."""

    def update_ema(self) -> float:
        """Move the weights toward the policy's; returns the norm of the change, over the whole model."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass over the micro-batches of an optimizer step gave: its metrics, and the head's outputs [T] for each
    micro-batch that `is_first_pass`, in rank-major order."""

    metrics: Metrics = field(default_factory=Metrics)
    outputs: tuple[FloatArray, ...] = ()

    def __add__(self, other: "PassReport") -> "PassReport":
        return PassReport(metrics=self.metrics + other.metrics, outputs=self.outputs + other.outputs)


class TrainEngine(TokenScorer, Protocol):
    """A model that is trained. Only `optim_step` changes its weights."""

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        """Accumulate the gradient of the sum of the micro-batches' losses (rank-major order, as `forward`). The report
        holds the outputs for those that are a first pass."""
        ...

    def optim_step(self) -> StepReport:
        """Apply the accumulated gradient on all ranks; if it is not finite on any rank, skip the step on all."""
        ...

    def send_weights(self, version: int) -> SyncReport:
        """Send this model's weights to the rollout engines as `version`, and verify that they arrived."""
        ...

    def save(self, directory: Path) -> None:
        """Write everything needed to continue bit for bit: weights, optimizer state, schedule, random state."""
        ...

    def load(self, directory: Path) -> None: ...

    def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format (safetensors + tokenizer)."""
        ...


class RewardSource(Protocol):
    """Scores responses. Returns one finite reward for each, or raises RewardError: no reward is ever made up."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        """Item i is `responses[i]`, the decoded text of `rollouts[i]`, which responds to `prompts[i]`."""
        ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """Where a run's metrics are logged."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None: ...

    def close(self) -> None: ...
