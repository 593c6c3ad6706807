"""How much a step of a run computes: sequences and tokens, by phase."""

from dataclasses import dataclass
from math import ceil

from rlhf.algorithms.needs import Needs
from rlhf.config.algo import num_epochs
from rlhf.config.commands import OnlineConfig, TrainConfig, method_of
from rlhf.config.reward import StartedSource
from rlhf.config.rollout import RolloutSection
from rlhf.types import SCORED_BY, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of a prompt and of a response; None takes the limit in the config."""

    prompt: float | None = None
    response: float | None = None


LIMITS = Lengths()
"""Every sequence as long as the config allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of the loop."""

    sampled: int
    """Responses sampled by the engines; 0 in an offline run."""
    learned: int
    """Sequences that are learned from in one epoch."""
    prompt_tokens: float
    response_tokens: float
    longest: int
    """Tokens of the longest sequence that the config allows."""
    least_decoded: float
    """Tokens that are decoded one after the other during a step, at the least: those of its longest response; where
    several steps are under way, of the part of it that falls into one. 0 where no step waits for a certain response."""
    micro_batch_tokens: int
    """Most tokens of one forward pass on one rank."""
    num_passes: int
    num_updates: int
    """Optimizer steps in all passes."""
    measured: frozenset[Role]
    """Models that compute log-probs or values of each sequence once before learning."""
    scored: bool
    """Whether a reward model scores each sampled sequence."""

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def sampled_tokens(self) -> float:
        """Prompts and responses of one step."""
        return self.sampled * self.sequence_tokens

    @property
    def learned_tokens(self) -> float:
        """Tokens of one epoch."""
        return self.learned * self.sequence_tokens


def workload(config: TrainConfig, needs: Needs, lengths: Lengths = LIMITS) -> Workload:
    """One step of a resolved config."""
    measured = frozenset(SCORED_BY[signal] for signal in needs.signals)
    updates = ceil(config.examples_per_step / config.train.batch_size) * num_epochs(config.algo)
    if config.train.fuse_old_log_probs and needs.late_old_log_probs and updates == 1:
        measured = measured - {Role.POLICY}
    if needs.ema_reference is not None:
        measured = measured - {Role.REFERENCE} | {Role.POLICY}
    learned = config.examples_per_step * method_of(config).sequences_per_example
    batch_tokens = config.train.max_tokens_per_micro_batch
    if not isinstance(config, OnlineConfig):
        longest = config.data.max_tokens
        return Workload(
            sampled=0,
            learned=learned,
            prompt_tokens=lengths.prompt or 0.0,
            response_tokens=lengths.response if lengths.response is not None else longest - (lengths.prompt or 0.0),
            longest=longest,
            least_decoded=0.0,
            micro_batch_tokens=max(batch_tokens, longest),
            num_passes=1,
            num_updates=1,
            measured=frozenset(),  # a stored reference is measured before the first step
            scored=False,
        )
    rollout = config.rollout
    responses = rollout.batch_size * rollout.group_size
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    response_tokens = rollout.max_response_tokens if lengths.response is None else lengths.response
    return Workload(
        sampled=responses + rollout.batch_size * needs.greedy_baseline,
        learned=learned,
        prompt_tokens=rollout.max_prompt_tokens if lengths.prompt is None else lengths.prompt,
        response_tokens=response_tokens,
        longest=longest,
        least_decoded=least_decoded(rollout, response_tokens),
        micro_batch_tokens=max(batch_tokens, longest),
        num_passes=num_epochs(config.algo),
        num_updates=updates,
        measured=measured,
        scored=any(isinstance(source, StartedSource) for source in config.reward.all_sources),
    )


def least_decoded(rollout: RolloutSection, mean_tokens: float) -> float:
    """`Workload.least_decoded` of responses whose lengths are geometric, with this mean, and cut at the limit.

    The longest of n such lengths is the mean times the sum of 1/k for k from 1 to n. With `oversample`, a step waits
    for n of m, and the sum begins at m - n + 1 and ends at m.
    """
    if rollout.max_lag and rollout.order == "ready":
        return 0.0
    needed = rollout.batch_size * rollout.group_size
    asked = ceil(rollout.oversample * rollout.batch_size) * rollout.group_size
    longest = mean_tokens * sum(1.0 / k for k in range(asked - needed + 1, asked + 1))
    return min(float(rollout.max_response_tokens), longest) / (rollout.max_lag + 1)
