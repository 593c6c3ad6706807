"""The responses of a step, and the lines that record them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf.episode import Episode, EpisodeRollout
from rlhf.types import Experience, Json, ScoredGroup, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResponses:
    """What was sampled in a step: `trained` to be learned from, `evaluated` for held-out prompts. Responses of a data
    set are not among them."""

    trained: Sequence[ScoredGroup] = ()
    advantages: Mapping[str, float] = field(default_factory=dict)
    """Response id -> the mean advantage of the tokens that were learned from. Only of algorithms with advantages, and
    without responses of which no token was learned from."""
    evaluated: Sequence[ScoredGroup] = ()


def mean_advantages(experiences: Sequence[Experience]) -> dict[str, float]:
    """Id -> the mean advantage of the tokens that were learned from, of each experience with one sequence and
    advantages."""
    found = {}
    for experience in experiences:
        if len(experience.sequences) != 1 or Signal.ADVANTAGES not in experience.sequences[0].signals:
            continue
        (sequence,) = experience.sequences
        advantages = sequence.signals[Signal.ADVANTAGES][sequence.loss_mask]
        if len(advantages):
            # What `mean` does, without its checks, which cost more than the sum.
            found[experience.id] = float(np.add.reduce(advantages) / len(advantages))
    return found


def response_rows(
    step: int, groups: Sequence[ScoredGroup], advantages: Mapping[str, float]
) -> Iterator[dict[str, Json]]:
    """A line for each sampled response. `group` counts the groups of the step from 0: a step may draw a prompt twice.
    Numbers that are not finite become null, which every JSON reader takes."""
    for number, group in enumerate(groups):
        for text, reward, rollout in zip(group.texts, group.rewards, group.rollouts, strict=True):
            yield {
                "step": step,
                "group": number,
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.text,
                "label": group.prompt.label,
                "columns": dict(group.prompt.metadata),
                "response": text,
                "reward": _finite(reward.total),
                "parts": {name: _finite(value) for name, value in reward.parts.items()},
                "advantage": advantages.get(rollout.id),
                "finish_reason": rollout.finish_reason,
                "num_tokens": len(rollout.token_ids),
                "weight_version": rollout.weight_version,
                **({"episode": episode_values(rollout.episode)} if isinstance(rollout, EpisodeRollout) else {}),
            }


def episode_values(episode: Episode) -> dict[str, Json]:
    """What happened turn by turn, for a row. Times are left out: they differ between runs that are the same."""
    return {
        "messages": [{"role": said.role, "content": said.content, **said.fields} for said in episode.messages],
        "ending": episode.ending,
        "calls": dict(episode.calls),
        "num_failed_calls": episode.num_failed_calls,
        "reward": episode.reward,
        "failure": episode.failure,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
