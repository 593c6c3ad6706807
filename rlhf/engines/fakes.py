"""Engines without models, to test the training loop and to try it out: numpy only, fast, and they really learn.

A fake model is a table with one number for each token. Its log-probs are the table's log-softmax, its values and scores
are the table's entries, so all gradients are written out here, and the reward of a run with fakes rises.
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlhf.engines.base import PassReport
from rlhf.types import (
    FinishReason,
    FloatArray,
    Head,
    IntArray,
    Json,
    Message,
    Metrics,
    PackedTokens,
    Prompt,
    Reward,
    Rollout,
    RolloutRequest,
    Signal,
    StepReport,
    SyncReport,
    TokenIds,
    TrainBatch,
)

Table = npt.NDArray[np.float64]


class FakeTokenizer:
    """Token id = position in `alphabet`, after padding (0) and the end of text (1)."""

    has_chat_template = True
    eos_token_id = 1
    pad_token_id = 0
    stop_token_ids: tuple[int, ...] = (1,)
    control_tokens: tuple[str, ...] = ("<pad>", "<eos>")

    def __init__(self, alphabet: str = "abcdefgh") -> None:
        self.alphabet = alphabet

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return len(self.alphabet) + 2

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [self.alphabet.index(character) + 2 for character in text]

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[i - 2] for i in token_ids if i >= 2)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Json] = ()) -> str:
        return "".join(message.content for message in messages)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.alphabet.encode()).hexdigest()


def log_softmax(table: Table) -> Table:
    """Log-probabilities of a table of logits."""
    shifted: Table = table - table.max()
    result: Table = shifted - np.log(np.exp(shifted).sum())
    return result


def predict(table: Table, head: Head, batch: PackedTokens) -> FloatArray:
    """The outputs of a model with this table: [T] log-probs or values, 0 at the first token of a sequence; [S] scores,
    or [T] token scores. Log-probs that are not `wanted` are NaN, so that code that reads one fails."""
    if head is Head.TOKEN_SCORES:
        return table[batch.token_ids].astype(np.float32)
    if head is Head.SCORES:
        return table[batch.token_ids[np.cumsum(batch.lengths) - 1]].astype(np.float32)
    entries = log_softmax(table) if head is Head.LOG_PROBS else table
    outputs = entries[batch.token_ids].astype(np.float32)
    outputs[np.cumsum(batch.context_lengths) - batch.context_lengths] = 0.0
    if head is Head.LOG_PROBS and batch.wanted is not None:
        outputs[~batch.wanted] = np.nan
    return outputs


class FakeScorer:
    """A model that only runs forward. `calls` counts the calls of `forward`."""

    def __init__(self, table: Table, head: Head, num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self.table = table.copy()
        self.head = head
        self.calls = 0

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        require_rank_major(batches, self.num_ranks)
        self.calls += 1
        return [predict(self.table, self.head, batch) for batch in batches]


class FakeRollout:
    """Samples from a table that a `FakeTrainEngine` sends. A response ends with the stop token (id 1)."""

    def __init__(self, num_tokens: int, delay: Callable[[], None] = lambda: None) -> None:
        self.table: Table = np.zeros(num_tokens)
        self.version = -1
        self.awake = True
        self.num_requests = 0
        self._delay = delay
        self._lock = threading.Lock()

    def receive(self, version: int, table: Table) -> str:
        """Serve `table` as `version` from now on; returns its digest."""
        with self._lock:
            self.table, self.version = table.copy(), version
        return digest(table)

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """Futures that have ended already."""
        futures: list[Future[Rollout]] = [Future() for _ in requests]
        for future, rollout in zip(futures, self.generate(requests), strict=True):
            future.set_result(rollout)
        return futures

    def abort(self, request_ids: Collection[str]) -> None:
        """Nothing is under way."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Sample at once, after the delay."""
        if not self.awake:
            raise RuntimeError("a sleeping engine was asked for responses")
        self._delay()
        with self._lock:
            table, version = self.table, self.version
            self.num_requests += len(requests)
        return [self._respond(request, table, version) for request in requests]

    def _respond(self, request: RolloutRequest, table: Table, version: int) -> Rollout:
        generator = np.random.default_rng(request.seed)
        log_probs = log_softmax(table)
        greedy = request.sampling.temperature == 0
        tokens: list[int] = []
        while len(tokens) < request.sampling.max_tokens and tokens[-1:] != [1]:
            tokens.append(int(table.argmax() if greedy else generator.choice(len(table), p=np.exp(log_probs))))
        return Rollout(
            id=request.id,
            prompt_id=request.prompt_id,
            token_ids=np.array(tokens, dtype=np.int64),
            log_probs=log_probs[tokens].astype(np.float32),
            finish_reason=FinishReason.STOP if tokens[-1:] == [1] else FinishReason.LENGTH,
            weight_version=version,
        )

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        return [predict(self.table, Head.LOG_PROBS, batch) for batch in sequences]

    def sleep(self) -> None:
        self.awake = False

    def wake(self) -> None:
        self.awake = True

    def close(self) -> None:
        self.awake = False


class FakeTrainEngine(FakeScorer):
    """A table that is trained by gradient descent with momentum.

    Losses: likelihood, or PPO's first-order advantage-weighted log-prob (LOG_PROBS); squared error to the returns
    (VALUES); Bradley-Terry of an example's first sequence against its later ones (SCORES); cross-entropy to the returns
    (TOKEN_SCORES). `finite` decides whether the n-th update has a finite gradient.
    """

    def __init__(
        self,
        table: Table,
        head: Head,
        *,
        num_ranks: int = 1,
        lr: float = 0.5,
        rollout: FakeRollout | None = None,
        finite: Callable[[int], bool] = lambda _: True,
    ) -> None:
        super().__init__(table, head, num_ranks)
        self.num_steps = 0
        self.seen: list[TrainBatch] = []
        self._lr = lr
        self._rollout = rollout
        self._finite = finite
        self._has_moved = False
        self.copy: Table = self.table.copy()
        """The table of `FakeEmaReference`."""
        self._momentum: Table = np.zeros_like(self.table)
        self._gradient: Table = np.zeros_like(self.table)

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        require_rank_major(batches, self.num_ranks)
        self.seen += batches
        metrics, first_outputs = Metrics(), []
        for batch in batches:
            outputs = predict(self.table, self.head, batch.tokens)
            if batch.is_first_pass:
                first_outputs.append(outputs)
            if batch.is_padding:
                continue
            loss, gradient, more = GRADIENTS[self.head](self.table, outputs, batch)
            self._gradient += gradient
            metrics += Metrics(sums={f"{batch.objective}/loss": loss, **more})
        return PassReport(metrics=metrics, outputs=tuple(first_outputs))

    def optim_step(self) -> StepReport:
        finite = self._finite(self.num_steps)
        norm = float(np.linalg.norm(self._gradient)) if finite else float("nan")
        before = self.table.copy()
        if finite:
            self._momentum = 0.5 * self._momentum + self._gradient
            self.table -= self._lr * self._momentum
        self._gradient = np.zeros_like(self.table)
        unmoved = ("table",) if finite and not self._has_moved and (before == self.table).all() else ()
        self._has_moved = self._has_moved or finite
        self.num_steps += 1
        return StepReport(grad_norm=norm, lr=self._lr, finite=finite, unmoved=unmoved)

    def send_weights(self, version: int) -> SyncReport:
        if self._rollout is None:
            raise RuntimeError("this engine has no rollout engine to send weights to")
        received = self._rollout.receive(version, self.table)
        return SyncReport(
            version=version,
            digest=received,
            num_bytes=self.table.nbytes,
            seconds=0.0,
            num_buckets=1,
            num_remote_calls=1,
        )

    def save(self, directory: Path) -> None:
        state = {"table": self.table, "momentum": self._momentum, "copy": self.copy, "num_steps": self.num_steps}
        np.savez(directory / "engine.npz", **state)  # type: ignore[arg-type]

    def load(self, directory: Path) -> None:
        with np.load(directory / "engine.npz") as arrays:
            self.table, self._momentum, self.copy = arrays["table"], arrays["momentum"], arrays["copy"]
            self.num_steps = int(arrays["num_steps"])

    def export(self, directory: Path) -> None:
        np.save(directory / "table.npy", self.table)


class FakeEmaReference:
    """The EMA reference of a `FakeTrainEngine`, which keeps its table."""

    def __init__(self, engine: FakeTrainEngine, decay: float) -> None:
        self.num_ranks = engine.num_ranks
        self._engine = engine
        self._decay = decay

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        require_rank_major(batches, self.num_ranks)
        return [predict(self._engine.copy, Head.LOG_PROBS, batch) for batch in batches]

    def update_ema(self) -> float:
        before = self._engine.copy
        self._engine.copy = self._decay * before + (1 - self._decay) * self._engine.table
        return float(np.linalg.norm(self._engine.copy - before))


class FakeReward:
    """The share of a response's characters that are `wanted`, times `scale`."""

    def __init__(self, wanted: str = "a", scale: float = 1.0) -> None:
        self._wanted = wanted
        self._scale = scale

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        shares = [response.count(self._wanted) / max(len(response), 1) for response in responses]
        return [Reward(total=self._scale * share, parts={"wanted": share}) for share in shares]

    def close(self) -> None:
        """Nothing to close."""


def digest(table: Table) -> str:
    """sha256 of a table."""
    return hashlib.sha256(table.tobytes()).hexdigest()


def require_rank_major(batches: Sequence[object], num_ranks: int) -> None:
    """Raise ValueError unless all ranks run the same number of micro-batches, at least one."""
    if not batches or len(batches) % num_ranks:
        raise ValueError(f"{len(batches)} micro-batches for {num_ranks} ranks")


Gradient = tuple[float, Table, Mapping[str, float]]


def scatter(size: int, token_ids: IntArray, numbers: Table) -> Table:
    """[size]: for each token id the sum of the numbers at its positions."""
    return np.bincount(token_ids, weights=numbers, minlength=size).astype(np.float64)


def log_prob_gradient(table: Table, outputs: FloatArray, batch: TrainBatch) -> Gradient:
    """-sum(weight * log-prob) / tokens; the weight is the advantage, or 1 without advantages."""
    weight = batch.loss_mask.astype(np.float64)
    if Signal.ADVANTAGES in batch.signals:
        weight = weight * batch.signals[Signal.ADVANTAGES]
    weight /= max(batch.denominators.tokens, 1.0)
    gradient: Table = weight.sum() * np.exp(log_softmax(table)) - scatter(len(table), batch.tokens.token_ids, weight)
    more = {}
    old = outputs if batch.is_first_pass else batch.signals.get(Signal.OLD_LOG_PROBS)
    if old is not None and Signal.ADVANTAGES in batch.signals:
        moved = np.where(batch.loss_mask, old - outputs, 0.0)
        more = {
            f"{batch.objective}/approx_kl": float(moved.sum()) / max(batch.denominators.tokens, 1.0),
            f"{batch.objective}/ratio_gap": float(np.abs(np.expm1(-moved)).max()),
        }
    return -float((weight * np.where(batch.loss_mask, outputs, 0.0)).sum()), gradient, more


def value_gradient(table: Table, outputs: FloatArray, batch: TrainBatch) -> Gradient:
    """sum((value - return)^2) / (2 * tokens)."""
    distance = np.where(batch.loss_mask, outputs - batch.signals[Signal.RETURNS], 0.0)
    error = distance / max(batch.denominators.tokens, 1.0)
    loss = float((distance**2).sum()) / 2
    return loss / max(batch.denominators.tokens, 1.0), scatter(len(table), batch.tokens.token_ids, error), {}


def score_gradient(table: Table, outputs: FloatArray, batch: TrainBatch) -> Gradient:
    """sum(-log sigmoid(first - later)) / examples, for each later sequence of an example."""
    ends = np.cumsum(batch.tokens.lengths) - 1
    last = batch.tokens.token_ids[ends]
    loss, gradient = 0.0, np.zeros_like(table)
    for example in range(int(batch.example_index.max()) + 1):
        first, *later = np.flatnonzero(batch.example_index == example).tolist()
        for other in later:
            gap = float(outputs[first] - outputs[other])
            loss += float(np.logaddexp(0.0, -gap)) / batch.denominators.examples
            pull = 1.0 / (1.0 + np.exp(gap)) / batch.denominators.examples
            gradient[last[first]] -= pull
            gradient[last[other]] += pull
    return loss, gradient, {}


def token_score_gradient(table: Table, outputs: FloatArray, batch: TrainBatch) -> Gradient:
    """sum(cross-entropy of sigmoid(score) and target) / tokens."""
    targets = batch.signals[Signal.TOKEN_TARGETS]
    scores, tokens = outputs.astype(np.float64), max(batch.denominators.tokens, 1.0)
    losses = np.where(batch.loss_mask, np.logaddexp(0.0, scores) - targets * scores, 0.0)
    error = np.where(batch.loss_mask, 1.0 / (1.0 + np.exp(-scores)) - targets, 0.0) / tokens
    return float(losses.sum()) / tokens, scatter(len(table), batch.tokens.token_ids, error), {}


GRADIENTS: dict[Head, Callable[[Table, FloatArray, TrainBatch], Gradient]] = {
    Head.LOG_PROBS: log_prob_gradient,
    Head.VALUES: value_gradient,
    Head.SCORES: score_gradient,
    Head.TOKEN_SCORES: token_score_gradient,
}
