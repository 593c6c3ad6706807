"""The values that flow through a run: Prompt -> Rollout -> ScoredGroup -> Experience -> TrainBatch -> metrics.

Each is frozen: a stage returns a new value. Token arrays are one-dimensional numpy arrays, which Ray shares between
processes without copying. Every per-token array is aligned with its tokens: entry t is about token t (its log-prob
given the tokens before it, the value of the state before it). The first entry, which nothing predicts, is always 0.
A response is one run of tokens, which may be made of several segments: conversations that the model read one by one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
TokenIds: TypeAlias = Sequence[int] | IntArray
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
ExpertArray: TypeAlias = npt.NDArray[np.integer[Any]]
"""[n, routers, top_k], uint8 or int16: the experts of each token in a model's routers; the maximum where unknown."""
UNSCORED = math.nan
"""The total of a reward whose source gave no score on purpose."""
Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


class Role(StrEnum):
    """What a group of processes does in a run."""

    POLICY = "policy"
    REFERENCE = "reference"
    CRITIC = "critic"
    REWARD = "reward"
    ROLLOUT = "rollout"


class Head(StrEnum):
    """What a model's forward pass returns for a packed batch of T tokens in S sequences."""

    LOG_PROBS = "log_probs"
    """[T]: log-probability of token t given the tokens before it, at the sampling temperature."""
    VALUES = "values"
    """[T]: value of the state before token t (the head's output at token t-1)."""
    SCORES = "scores"
    """[S]: the scalar head's output at the last token of each sequence."""
    TOKEN_SCORES = "token_scores"
    """[T]: the scalar head's output at token t itself."""


class Signal(StrEnum):
    """What a per-token array of a sequence holds. Computed by a model (`SCORED_BY`) or by an algorithm's
    `credit`; a new one is one more member and the code that computes it."""

    OLD_LOG_PROBS = "old_log_probs"
    """Log-prob of the token by the policy before the step (the behavior policy)."""
    SAMPLER_LOG_PROBS = "sampler_log_probs"
    """Log-prob of the token by the engine that sampled it; not finite where the engine gave none."""
    REF_LOG_PROBS = "ref_log_probs"
    """Log-prob of the token by the reference."""
    VALUES = "values"
    """Value of the state before the token, by the critic before the step (the "old values" of the value clip)."""
    ADVANTAGES = "advantages"
    """Advantage of the token, from `credit`."""
    RETURNS = "returns"
    """What the critic learns to predict, from `credit`."""
    TOKEN_TARGETS = "token_targets"
    """What a token-level score learns to predict: a process reward model's step labels, from 0 to 1."""


SCORED_BY: Mapping[Signal, Role] = {
    Signal.OLD_LOG_PROBS: Role.POLICY,
    Signal.VALUES: Role.CRITIC,
    Signal.REF_LOG_PROBS: Role.REFERENCE,
}
"""The signals that a model computes before credit, and which model."""


class FinishReason(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn; `role` is system, user, assistant or tool. `content` may be empty. `fields` is what else a
    template reads: reasoning_content, tool_calls, tool_call_id, name."""

    role: str
    content: str
    fields: Mapping[str, Json] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt. `text` is the rendered prompt whose tokens are `token_ids`."""

    id: str
    token_ids: IntArray
    text: str
    label: str | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    mixture: float = 0.0
    """Share of the reference in the logits, (1 - mixture) * policy + mixture * reference, before the temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """A request for one response. Its seed alone decides the tokens, whatever else is in the batch."""

    id: str
    prompt_id: str
    prompt_token_ids: IntArray
    seed: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response to a prompt: a data set's, or a `Rollout`.
    `loss_mask` is aligned with `token_ids`: False where a token was not written by the model (what an environment or a
    tool returned, a user's turn inside a demonstration). None: the model wrote every token. `step_labels`, in a data
    set of labeled steps: how good each step is, from 0 to 1; `loss_mask` is then True at the last token of each step.
    `segment_starts`: tokens from which on the model read nothing of what stands before them, not even the prompt.
    """

    id: str
    prompt_id: str
    token_ids: IntArray
    finish_reason: FinishReason
    loss_mask: BoolArray | None = None
    step_labels: tuple[float, ...] | None = None
    segment_starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Response):
    """A sampled response: the engine's token ids and log-probs [n], never edited: a stop token is there if sampled.
    `weight_version` is the oldest token's, -1 where no token was sampled (an episode that failed before its first
    turn); the first `num_older_tokens` are older than `newest_version`, if any. `routed_experts`: those that the engine
    used, of the prompt's tokens and then the response's; None if it does not record them."""

    log_probs: FloatArray
    weight_version: int
    num_older_tokens: int = 0
    newest_version: int = 0
    routed_experts: ExpertArray | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether any token of it was sampled."""
        return self.weight_version >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A score and the named, unweighted scores it was summed from, or other numbers that its source reports. A `total`
    of NaN says that nothing should be learned from the response: no algorithm sees it."""

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    logged: Mapping[str, float] = field(default_factory=dict)
    """What the call that scored the response reported by `rlhf.log`: the mean of each name."""
    turns: tuple[tuple[int, float], ...] = ()
    """Of a response of several turns: the index of each turn's last token, and what of `total` that turn earned."""

    @property
    def is_scored(self) -> bool:
        """Whether the response has a score."""
        return not math.isnan(self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyResponse:
    """The greedy response to a prompt and its reward: a baseline, which is not learned from."""

    rollout: Rollout
    reward: Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """All responses to one prompt with their texts and rewards: sampled and scored in this step, or read from a data
    set, whose rewards only order them."""

    prompt: Prompt
    responses: tuple[Response, ...]
    texts: tuple[str, ...]
    rewards: tuple[Reward, ...]
    margins: tuple[float, ...] = ()
    """A data set's margins of the first response over each later one, where it has them."""
    labels: tuple[bool, ...] = ()
    """A data set's label of each response, desirable or not, where it has labels."""
    baseline: GreedyResponse | None = None
    """The greedy response to the prompt, where the algorithm needs one."""

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """The responses that were sampled; none of a data set's."""
        return tuple(response for response in self.responses if isinstance(response, Rollout))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Prompt and response as one run of n tokens. `loss_mask[t]` is True where token t is to be learned from:
    a token that the policy sampled, or that a demonstration's assistant wrote. `segment_starts`: see `Response`; none
    is 0. `routed_experts`: those that the policy has to use."""

    token_ids: IntArray
    loss_mask: BoolArray
    segment_starts: tuple[int, ...] = ()
    routed_experts: ExpertArray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What an algorithm selected to learn from, before any model has scored its tokens: one response (PPO), a pair
    (DPO), a ranking of K (reward model). Its sequences always share a micro-batch.
    `sampler_log_probs` and `token_targets` are aligned with each sequence's tokens, 0 outside the response; a sequence
    beyond the former was not sampled. Examples of one prompt's group share `group`.
    """

    id: str
    sequences: tuple[TokenSequence, ...]
    rewards: tuple[float, ...]
    sampler_log_probs: tuple[FloatArray, ...] = ()
    margins: tuple[float, ...] = ()
    truncated: tuple[bool, ...] = ()
    weight_version: int | None = None
    """Policy version that sampled it; None where a data set gave it."""
    group: str = ""
    turns: tuple[tuple[int, float], ...] = ()
    """The index of each turn's last token in the sequence, and its reward: see `Reward.turns`."""
    baseline: GreedyResponse | None = None
    """The greedy response to the same prompt (ReMax)."""
    label: bool | None = None
    """Whether the response is desirable (KTO)."""
    token_targets: tuple[FloatArray, ...] = ()
    """Step labels at the last token of each step, from 0 to 1 (process reward model)."""


Signals: TypeAlias = Mapping[Signal, tuple[FloatArray, ...]]
"""Model outputs for one example: per signal in `needs.signals`, one array [n] per sequence; 0 outside `loss_mask`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedSequence(TokenSequence):
    """A sequence with the signals that a loss reads, each [n]. For a prompt of 3 tokens and a response of 2 with reward
    1 at its end, and gamma = lambda = 1, the returns are V_t + A_t:

    >>> loss_mask = np.array([False, False, False, True, True])
    >>> values = np.array([0, 0, 0, 0.5, 0.75], dtype=np.float32)
    >>> advantages = np.array([0, 0, 0, 0.5, 0.25], dtype=np.float32)
    >>> (values + advantages)[loss_mask].tolist()
    [1.0, 1.0]
    """

    signals: Mapping[Signal, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One unit of learning. What must stay together in a micro-batch (a pair, a ranking) is one experience.

    `targets` holds one number per sequence (rank score, label or reward); `margins` one for each later sequence against
    the first. `coefficients` (an adaptive KL coefficient) are fixed by the driver, the same in a step's experiences.
    """

    id: str
    sequences: tuple[LearnedSequence, ...]
    targets: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    coefficients: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """S sequences laid end to end without padding: `token_ids` [T] and `lengths` [S], sum(lengths) == T.
    `wanted` [T]: the tokens whose log-probs are computed, 0 elsewhere, which saves rows of the output layer (each as
    wide as the vocabulary). None: all. `temperature` divides the logits; None: the sampling temperature of the run.
    `segment_lengths`: of the parts of the sequences that do not see each other; None: each sequence is one.
    `routed_experts`: those that a token has to use, where they are known; None: a model's own choice everywhere.
    """

    token_ids: IntArray
    lengths: IntArray
    segment_lengths: IntArray | None = None
    wanted: BoolArray | None = None
    temperature: float | None = None
    routed_experts: ExpertArray | None = None

    @property
    def context_lengths(self) -> IntArray:
        """Of what goes through a model as a sequence of its own."""
        return self.lengths if self.segment_lengths is None else self.segment_lengths

    @property
    def position_ids(self) -> IntArray:
        """[T]: positions restart at 0 with each context, which tells attention where it begins."""
        starts = np.cumsum(self.context_lengths) - self.context_lengths
        return np.arange(len(self.token_ids), dtype=np.int64) - np.repeat(starts, self.context_lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over the whole batch of one optimizer step, all ranks and micro-batches: of loss tokens, of sequences with
    at least one loss token, of experiences."""

    tokens: float
    sequences: float
    examples: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One micro-batch of packed experiences. Ranks always run equally many, so it may hold no loss token.

    `loss_mask` and each of the `signals` are [T]. `example_index` [S] says which experience of this micro-batch a
    sequence belongs to, -1 in padding; `targets` and `margins` are [S] (a margin sits on the later sequence of its
    pair). `objective` names the loss among those of the algorithm. `is_first_pass`: the weights are still those of the
    old policy, so that this pass gives the old log-probs, which `signals` then lack.
    """

    tokens: PackedTokens
    loss_mask: BoolArray
    example_index: IntArray
    targets: FloatArray
    margins: FloatArray
    denominators: Denominators
    objective: str
    signals: Mapping[Signal, FloatArray] = field(default_factory=dict)
    coefficients: Mapping[str, float] = field(default_factory=dict)
    is_first_pass: bool = False

    @property
    def is_padding(self) -> bool:
        """Whether it only keeps a rank in step with the others: one token, which no loss reads."""
        return bool((self.example_index < 0).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Metrics of a step. `sums` were divided by global denominators already, so adding them over micro-batches and
    ranks gives the mean of the step; `maxima` combine by max. `warnings` are shown to the user."""

    sums: Mapping[str, float] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __add__(self, other: "Metrics") -> "Metrics":
        sums = {k: self.sums.get(k, 0.0) + other.sums.get(k, 0.0) for k in (*self.sums, *other.sums)}
        maxima = {k: max(m.get(k, -np.inf) for m in (self.maxima, other.maxima)) for k in (*self.maxima, *other.maxima)}
        return Metrics(sums=sums, maxima=maxima, warnings=self.warnings + other.warnings)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step did. `finite` is False where it was skipped because a gradient, on any rank, was not;
    `unmoved` names trainable parameters that did not change (filled in by the first step that
    was not skipped only)."""

    grad_norm: float
    lr: float
    finite: bool
    unmoved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One weight sync: which version, how much, how long, and the digest both sides agreed on."""

    version: int
    digest: str
    num_bytes: int
    seconds: float
    num_buckets: int
    num_remote_calls: int
