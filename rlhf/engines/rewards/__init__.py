"""Where rewards come from: a model, the user's function, a service, a judge, rules, or a weighted sum of those."""

from collections.abc import Iterable, Mapping, Sequence
from functools import singledispatch

import numpy as np

from rlhf.config.reward import (
    ChoiceSource,
    CodeSource,
    ExactMatchSource,
    FormatSource,
    FunctionSource,
    HttpSource,
    JudgeSource,
    LengthSource,
    MathSource,
    ModelSource,
    NumberSource,
    OverlongSource,
    PrmSource,
    PureSource,
    RegexSource,
    RemoteSource,
    Source,
    SourceSection,
    StartedSource,
)
from rlhf.engines.base import RewardSource, Tokenizer, TokenScorer
from rlhf.engines.rewards.choice import Choice
from rlhf.engines.rewards.exact_match import ExactMatch
from rlhf.engines.rewards.function import FunctionReward
from rlhf.engines.rewards.http import HttpReward
from rlhf.engines.rewards.judge import JudgeReward, RubricNeed
from rlhf.engines.rewards.length import LengthPenalty, OverlongPenalty
from rlhf.engines.rewards.maths import MathNeed, MathReward
from rlhf.engines.rewards.model import ModelReward
from rlhf.engines.rewards.number import NumberMatch
from rlhf.engines.rewards.pattern import PatternMatch
from rlhf.engines.rewards.process import FunctionProcess
from rlhf.engines.rewards.rule import RowNeed, Rule, RuleReward, row_line
from rlhf.engines.rewards.steps import StepReward
from rlhf.engines.rewards.think_format import ThinkFormat
from rlhf.engines.rewards.unit_tests import CodeNeed, CodeReward
from rlhf.engines.rewards.weighted import Weighted, WeightedRewards
from rlhf.errors import ConfigError
from rlhf.types import FinishReason, Head, Json, Prompt, Reward, Rollout

__all__ = [
    "CodeReward",
    "FunctionReward",
    "HttpReward",
    "JudgeReward",
    "MathReward",
    "ModelReward",
    "RuleReward",
    "StepReward",
    "Weighted",
    "WeightedRewards",
    "build_reward",
    "build_rule",
    "build_scored",
    "build_source",
    "check_function",
    "head_of",
    "probe",
    "row_problems",
]

PROBE_ANSWERS = ("Yes.", "No.")
MAX_ROW_LINES = 5


def head_of(source: StartedSource) -> Head:
    """What the source's model is loaded with."""
    return Head.TOKEN_SCORES if isinstance(source, PrmSource) else Head.SCORES


def build_scored(
    source: StartedSource,
    scorer: TokenScorer,
    *,
    policy_tokenizer: Tokenizer,
    reward_tokenizer: Tokenizer,
    max_tokens_per_batch: int = 4096,
) -> RewardSource:
    """A source whose model has been started as `scorer`, with the head that `head_of` says."""
    if isinstance(source, PrmSource):
        return StepReward(source, scorer, tokenizer=reward_tokenizer, max_tokens_per_batch=max_tokens_per_batch)
    return ModelReward(
        scorer,
        policy_tokenizer=policy_tokenizer,
        reward_tokenizer=reward_tokenizer,
        max_tokens_per_batch=max_tokens_per_batch,
    )


def build_source(source: PureSource | RemoteSource) -> RewardSource:
    """Open one source that needs no model. Raises ConfigError where it cannot be used."""
    match source:
        case FunctionSource():
            return FunctionReward(source.function, timeout_s=source.timeout_s, memory_gib=source.memory_gib)
        case HttpSource():
            return HttpReward(source)
        case JudgeSource():
            return JudgeReward(source)
        case MathSource():
            return MathReward(source)
        case CodeSource():
            return CodeReward(source)
        case _:
            return RuleReward(build_rule(source), source.label)


@singledispatch
def build_rule(source: SourceSection) -> Rule:
    """The rule of a section."""
    raise TypeError(f"{source.type} is no rule")


build_rule.register(ExactMatchSource, ExactMatch)
build_rule.register(ChoiceSource, Choice)
build_rule.register(NumberSource, NumberMatch)
build_rule.register(FormatSource, ThinkFormat)
build_rule.register(LengthSource, LengthPenalty)
build_rule.register(OverlongSource, OverlongPenalty)
build_rule.register(RegexSource, PatternMatch)


def row_need(source: Source) -> RowNeed | None:
    """What a source needs of every row, where it needs anything."""
    match source:
        case MathSource():
            return MathNeed(source)
        case CodeSource():
            return CodeNeed(source.tests_key)
        case JudgeSource():
            return RubricNeed(source)
        case ModelSource() | PrmSource() | FunctionSource() | HttpSource():
            return None
        case _:
            return build_rule(source)


def row_problems(sources: Sequence[Source], rows: Iterable[tuple[str, str | None, Mapping[str, Json]]]) -> list[str]:
    """What rows (id, label, other columns) lack that the sources need: a line each, some of them where there are
    many."""
    needs = [(source.label, need) for source in sources if (need := row_need(source)) is not None]
    lines = [
        row_line(row_id, name, problem)
        for row_id, label, columns in (rows if needs else ())
        for name, need in needs
        if (problem := need.row_problem(label, columns)) is not None
    ]
    left_out = len(lines) - MAX_ROW_LINES
    return [*lines[:MAX_ROW_LINES], f"data: {left_out} more rows like these."] if left_out > 0 else lines


def build_reward(sources: Sequence[Source], opened: Mapping[str, RewardSource]) -> WeightedRewards:
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
        elif isinstance(source, StartedSource):
            raise ConfigError(f"reward: no model was started for {source.label}.")
        else:
            one = build_source(source)
        weighted[source.label] = Weighted(source=one, weight=source.weight)
    return WeightedRewards(weighted)


def check_function(function: str) -> None:
    """Import `module:name` in a child process and check its signature. Raises ConfigError."""
    FunctionProcess(function).close()


def probe(source: RewardSource, prompt: Prompt, tokenizer: Tokenizer, *, group_size: int = 1) -> Reward:
    """Score made answers to a real prompt, so that a source that cannot work is known before a run starts: two where
    the run samples several, because a judge compares them, else one. Returns the first one's reward."""
    answers = PROBE_ANSWERS[:group_size]
    rollouts = [_made_rollout(prompt, answer, tokenizer) for answer in answers]
    return source.score([prompt] * len(answers), answers, rollouts)[0]


def _made_rollout(prompt: Prompt, answer: str, tokenizer: Tokenizer) -> Rollout:
    token_ids = np.array([*tokenizer.encode(answer), tokenizer.eos_token_id], dtype=np.int64)
    return Rollout(
        id=f"probe/{answer}",
        prompt_id=prompt.id,
        token_ids=token_ids,
        log_probs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=-1,
    )


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
