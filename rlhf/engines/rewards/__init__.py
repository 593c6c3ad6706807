"""Where rewards come from: a model, the user's function, a service, or a weighted sum of those."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.config.reward import FunctionSource, HttpSource, ModelSource
from rlhf.engines.base import RewardSource, Tokenizer
from rlhf.engines.rewards.function import FunctionReward
from rlhf.engines.rewards.http import HttpReward
from rlhf.engines.rewards.model import ModelReward
from rlhf.engines.rewards.process import FunctionProcess
from rlhf.engines.rewards.weighted import Weighted, WeightedRewards
from rlhf.errors import ConfigError
from rlhf.types import FinishReason, Prompt, Reward, Rollout

__all__ = [
    "FunctionReward",
    "HttpReward",
    "ModelReward",
    "Weighted",
    "WeightedRewards",
    "build_reward",
    "build_source",
    "check_function",
    "probe",
]

PROBE_ANSWER = "Yes."


def build_source(source: FunctionSource | HttpSource) -> RewardSource:
    """Open one source that needs no model. Raises ConfigError where it cannot be used."""
    if isinstance(source, FunctionSource):
        return FunctionReward(source.function, timeout_s=source.timeout_s, memory_gib=source.memory_gib)
    return HttpReward(source)


def build_reward(
    sources: Sequence[ModelSource | FunctionSource | HttpSource], opened: Mapping[str, RewardSource]
) -> WeightedRewards:
    """The weighted sum of `sources`. `opened` holds those that live elsewhere (models, remote functions) by label; the
    others are opened here. Raises ConfigError with every problem."""
    labels = [source.label for source in sources]
    problems = [f'reward.sources: two are called "{label}"; give each a name.' for label in _repeated(labels)]
    if problems:
        raise ConfigError(problems)
    weighted: dict[str, Weighted] = {}
    for source in sources:
        if source.label in opened:
            one = opened[source.label]
        elif isinstance(source, ModelSource):
            raise ConfigError(f"reward: no model was started for {source.label}.")
        else:
            one = build_source(source)
        weighted[source.label] = Weighted(source=one, weight=source.weight)
    return WeightedRewards(weighted)


def check_function(function: str) -> None:
    """Import `module:name` in a child process and check its signature. Raises ConfigError."""
    FunctionProcess(function).close()


def probe(source: RewardSource, prompt: Prompt, tokenizer: Tokenizer) -> Reward:
    """Score one made answer to a real prompt, so that a source that cannot work is known before a run starts."""
    token_ids = np.array([*tokenizer.encode(PROBE_ANSWER), tokenizer.eos_token_id], dtype=np.int64)
    rollout = Rollout(
        id="probe",
        prompt_id=prompt.id,
        token_ids=token_ids,
        log_probs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=-1,
    )
    return source.score([prompt], [PROBE_ANSWER], [rollout])[0]


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
