"""The few interfaces that the loop sees; single-process engines, pools of Ray workers and fakes all implement them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

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
    TrainBatch,
)


class Tokenizer(Protocol):
    """Text to token ids and back. `stop_token_ids` end an answer; `pad_token_id` is never trained on;
    `control_tokens` are the special tokens as they would stand in a text."""

    eos_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    control_tokens: tuple[str, ...]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Apply the chat template. Raises ModelError where there is none."""
        ...

    def fingerprint(self) -> str:
        """sha256 of vocabulary, special ids and chat template: roles that share token ids must agree on it."""
        ...


class RolloutEngine(Protocol):
    """Samples answers. An engine serves only a verified whole version of the weights."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """One rollout a request, in the order of the requests. Thread-safe."""
        ...

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """Log-probs [T] at temperature 1 of given tokens under the served weights; the probe after a sync."""
        ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class TokenScorer(Protocol):
    """Runs a model forward over packed micro-batches.

    `batches` are in rank-major order: with n = len(batches) / num_ranks, rank r runs batches[r*n:(r+1)*n]. Ranks
    always run equally many.
    """

    num_ranks: int

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """For each micro-batch what the model's head says: [T] log-probs or values, or [S] scores."""
        ...


class EmaReferenceScorer(TokenScorer, Protocol):
    """A reference that follows the policy. Only `update_ema` changes it."""

    def update_ema(self) -> float:
        """Move toward the policy as it is now; returns the norm of the change, over the whole model."""
        ...


class TrainEngine(TokenScorer, Protocol):
    """A model that learns. Only `optim_step` changes weights."""

    def forward_backward(self, batches: Sequence[TrainBatch]) -> Metrics:
        """Accumulate the gradient of the micro-batches' summed losses (rank-major order, as `forward`)."""
        ...

    def optim_step(self) -> StepReport:
        """Apply the accumulated gradient on all ranks, or skip it on all ranks where it is not finite anywhere."""
        ...

    def send_weights(self, version: int) -> SyncReport:
        """Give the rollout engines this model's weights as `version`, and verify that they hold them."""
        ...

    def save(self, directory: Path) -> None:
        """Write everything needed to continue bit for bit: weights, optimizer, schedule, RNG."""
        ...

    def load(self, directory: Path) -> None: ...

    def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format (safetensors + tokenizer)."""
        ...


class RewardSource(Protocol):
    """Scores answers. Returns one reward a response, each finite, or raises RewardError: a reward is never invented."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        """Item i is `responses[i]`, the decoded text of `rollouts[i]`, an answer to `prompts[i]`."""
        ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """Where a run's figures go."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None: ...

    def close(self) -> None: ...
