"""From scored samples to training data. Pure functions; nothing is read or written here.

best of n, RAFT (Dong et al. 2023): the best response to each prompt. Rejection sampling, RFT (Yuan et al. 2023): every
different response above a threshold. Reward-conditioned SFT: the reward is written into the prompt. Pairs for iterative
DPO: best against worst of each prompt.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from rlhf.orchestrator.data.dialogue import parse_messages
from rlhf.types import Json

Row: TypeAlias = dict[str, Json]

EMPTY = "empty"
UNSCORED = "without a score"
TRUNCATED = "truncated"
REPEATED = "the same as another response to the prompt"
BELOW = "reward below the threshold"
SURPLUS = "more than max_per_prompt"
TIED = "prompts whose responses are all equally good"
CLOSE = "prompts whose best and worst are closer than min_margin"
LONELY = "prompts with one response only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response with its reward, NaN where its source gave none: nothing is learned from it. `prompt` is text or a
    list of messages; `row` is everything that is known about it. `turns` are the messages of a response of several
    turns, from the model's first one to its last one."""

    id: str
    prompt: Json
    response: str
    reward: float
    turns: Sequence[Json] = ()
    truncated: bool = False
    row: Mapping[str, Json] = field(default_factory=dict)

    @property
    def is_scored(self) -> bool:
        """Whether the response has a reward."""
        return not math.isnan(self.reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """Rows to train on, and what was left out, by reason."""

    rows: tuple[Row, ...]
    dropped: Mapping[str, int]


def usable(samples: Sequence[Sample], *, keep_truncated: bool, dropped: Counter[str]) -> list[list[Sample]]:
    """The responses that can be learned from, grouped by prompt, in the order of the samples. A response that was cut
    off would teach to end in the middle of a sentence."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if not sample.is_scored:
            dropped[UNSCORED] += 1
        elif not sample.response.strip():
            dropped[EMPTY] += 1
        elif sample.truncated and not keep_truncated:
            dropped[TRUNCATED] += 1
        else:
            groups.setdefault(json.dumps(sample.prompt, sort_keys=True), []).append(sample)
    return list(groups.values())


def select(
    samples: Sequence[Sample],
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    max_per_prompt: int | None = None,
    keep_truncated: bool = False,
) -> Curated:
    """The best different responses to each prompt: those whose reward is at least `threshold`, or at least the
    `quantile` of all rewards, and of these the best `max_per_prompt`. Equal rewards: the one sampled first."""
    dropped: Counter[str] = Counter()
    groups = usable(samples, keep_truncated=keep_truncated, dropped=dropped)
    rewards = [sample.reward for group in groups for sample in group]
    bound = float(np.quantile(rewards, quantile)) if quantile is not None and rewards else threshold
    rows: list[Row] = []
    for group in groups:
        above = [sample for sample in _best_first(group) if bound is None or sample.reward >= bound]
        dropped[BELOW] += len(group) - len(above)
        different = _different(above)
        dropped[REPEATED] += len(above) - len(different)
        kept = different[:max_per_prompt]
        dropped[SURPLUS] += len(different) - len(kept)
        rows += [_demonstration(sample) for sample in kept]
    return Curated(rows=tuple(rows), dropped=+dropped)


def condition(samples: Sequence[Sample], *, prompt_format: str, keep_truncated: bool = False) -> Curated:
    """Every different response under a prompt that says how good it is: `{prompt}` and `{reward}` of `prompt_format`
    are the prompt (of messages: the last one's text) and the reward on a scale from 0, the worst of all samples, to 1,
    the best. Where all rewards are equal they say 1."""
    dropped: Counter[str] = Counter()
    groups = usable(samples, keep_truncated=keep_truncated, dropped=dropped)
    rewards = [sample.reward for group in groups for sample in group]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    rows: list[Row] = []
    for group in groups:
        different = _different(_best_first(group))
        dropped[REPEATED] += len(group) - len(different)
        for sample in different:
            shown = (sample.reward - low) / (high - low) if high > low else 1.0
            rows.append(
                _demonstration(sample)
                | {"prompt": _written_into(sample.prompt, prompt_format, shown), "reward_shown": shown}
            )
    return Curated(rows=tuple(rows), dropped=+dropped)


def pair(samples: Sequence[Sample], *, min_margin: float = 0.0, keep_truncated: bool = False) -> Curated:
    """The best response to each prompt against the worst of those that say something else, where they differ in reward
    (by `min_margin` at least)."""
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    for group in usable(samples, keep_truncated=keep_truncated, dropped=dropped):
        best = max(group, key=lambda one: one.reward)
        others = [one for one in group if _words(one) != _words(best)]
        worst = min(others or group, key=lambda one: one.reward)
        if len(group) < 2:
            dropped[LONELY] += 1
        elif best.reward == worst.reward:
            dropped[TIED] += 1
        elif best.reward - worst.reward < min_margin:
            dropped[CLOSE] += 1
        elif not others:
            dropped[REPEATED] += 1
        else:
            rows.append(_pair(best, worst))
    return Curated(rows=tuple(rows), dropped=+dropped)


def describe(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of all samples, kept or not: mean reward, mean over prompts of the best, shares truncated and empty.
    Rewards are those of the responses that have one."""
    scored = [sample for sample in samples if sample.is_scored]
    if not scored:
        return {}
    best: dict[str, float] = {}
    for sample in scored:
        key = json.dumps(sample.prompt, sort_keys=True)
        best[key] = max(best.get(key, sample.reward), sample.reward)
    return {
        "prompts": float(len({json.dumps(sample.prompt, sort_keys=True) for sample in samples})),
        "answers": float(len(samples)),
        "reward": float(np.mean([sample.reward for sample in scored])),
        "best_reward": float(np.mean(list(best.values()))),
        "truncated": float(np.mean([sample.truncated for sample in samples])),
        "empty": float(np.mean([not sample.response.strip() for sample in samples])),
    }


def _best_first(group: Sequence[Sample]) -> list[Sample]:
    return sorted(group, key=lambda sample: -sample.reward)


def _different(samples: Sequence[Sample]) -> list[Sample]:
    """The first of each response, whatever the spaces."""
    return list({_words(sample): sample for sample in reversed(samples)}.values())[::-1]


def _words(sample: Sample) -> str:
    return " ".join(sample.response.split())


def _demonstration(sample: Sample) -> Row:
    return {key: value for key, value in sample.row.items() if key != "episode"} | {
        "id": sample.id,
        "prompt": sample.prompt,
        "response": _learned(sample),
        "reward": sample.reward,
    }


def _learned(sample: Sample) -> Json:
    """A response as the column of a row."""
    return list(sample.turns) or sample.response


def _pair(best: Sample, worst: Sample) -> Row:
    shared = {key: best.row[key] for key in ("model", "label", "metadata", "tools") if key in best.row}
    return {
        "id": best.id,
        "rejected_id": worst.id,
        "prompt": best.prompt,
        "chosen": _learned(best),
        "rejected": _learned(worst),
        "score_chosen": best.reward,
        "score_rejected": worst.reward,
        **shared,
    }


def _written_into(prompt: Json, prompt_format: str, reward: float) -> Json:
    if not isinstance(prompt, list):
        return prompt_format.format(prompt=prompt, reward=reward)
    *before, last = prompt
    assert isinstance(last, dict), "samples were read as text or messages"
    (turn,) = parse_messages([last], "prompt")
    others = {key: value for key, value in last.items() if key != "value"}
    return [*before, {**others, "content": prompt_format.format(prompt=turn.content, reward=reward)}]
