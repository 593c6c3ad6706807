"""Reward sources: a reward model, the user's function, a service, a judge, rules, or a weighted sum of those."""

from collections.abc import Iterable, Mapping, Sequence
from functools import singledispatch

import numpy as np

from rlhf.config.reward import (
    ChoiceSource,
    CodeSource,
    EnvironmentSource,
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
from rlhf.config.reward.arguments import has_known_names
from rlhf.engines.base import PairTokenizer, RewardSource, Tokenizer, TokenScorer
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.choice import Choice
from rlhf.engines.rewards.encoder import EncoderReward
from rlhf.engines.rewards.episode_reward import EpisodeReward
from rlhf.engines.rewards.exact_match import ExactMatch
from rlhf.engines.rewards.function import FunctionReward, arguments_of
from rlhf.engines.rewards.function_process import FunctionProcess
from rlhf.engines.rewards.length import LengthPenalty, OverlongPenalty
from rlhf.engines.rewards.math_match import MathRequirement, MathReward
from rlhf.engines.rewards.model import ModelReward
from rlhf.engines.rewards.number_match import NumberMatch
from rlhf.engines.rewards.regex_match import PatternMatch
from rlhf.engines.rewards.rule import RowRequirement, Rule, RuleReward, row_line
from rlhf.engines.rewards.steps import StepReward
from rlhf.engines.rewards.think_format import ThinkFormat
from rlhf.engines.rewards.unit_tests import CodeRequirement, CodeReward
from rlhf.engines.rewards.weighted import Weighted, WeightedRewards
from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.repair import Repaired
from rlhf.types import FinishReason, Head, Json, Message, Prompt, Reward, Rollout

__all__ = [
    "CodeReward",
    "FunctionReward",
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
    "first_lines",
    "head_of",
    "made_up_rollout",
    "probe",
    "row_line",
    "row_problems",
]

PROBE_RESPONSES = ("Yes.", "No.")
MAX_ROW_LINES = 5


def head_of(source: StartedSource) -> Head:
    """The head that the source's model is loaded with."""
    return Head.TOKEN_SCORES if isinstance(source, PrmSource) else Head.SCORES


def build_scored(
    source: StartedSource,
    scorer: TokenScorer,
    *,
    policy_tokenizer: Tokenizer,
    reward_tokenizer: Tokenizer | PairTokenizer,
    max_tokens_per_batch: int = 4096,
) -> RewardSource:
    """A source whose model has been started as `scorer`, with the head that `head_of` gives. The tokenizer of an
    encoder is a PairTokenizer (`load_reward_tokenizer`)."""
    if isinstance(reward_tokenizer, PairTokenizer):
        return EncoderReward(
            scorer,
            policy_tokenizer=policy_tokenizer,
            reward_tokenizer=reward_tokenizer,
            max_tokens_per_batch=max_tokens_per_batch,
        )
    if isinstance(source, PrmSource):
        return StepReward(source, scorer, tokenizer=reward_tokenizer, max_tokens_per_batch=max_tokens_per_batch)
    return ModelReward(
        scorer,
        policy_tokenizer=policy_tokenizer,
        reward_tokenizer=reward_tokenizer,
        max_tokens_per_batch=max_tokens_per_batch,
    )


def build_source(source: PureSource | RemoteSource, repaired: Repaired = log_repair) -> RewardSource:
    """Open one source that needs no model; `repaired` is told of each fault that it repairs. Raises ConfigError if it
    cannot be used."""
    match source:
        case FunctionSource():
            return FunctionReward(
                source.function,
                timeout_s=source.timeout_s,
                memory_gib=source.memory_gib,
                network=source.network,
                repaired=repaired,
            )
        case HttpSource():
            from rlhf.engines.rewards.http import HttpReward  # noqa: PLC0415  imports an HTTP library: slow

            return HttpReward(source, repaired=repaired)
        case JudgeSource():
            from rlhf.engines.rewards.judge import JudgeReward  # noqa: PLC0415  as above

            return JudgeReward(source, repaired=repaired)
        case MathSource():
            return MathReward(source, repaired=repaired)
        case CodeSource():
            return CodeReward(source, repaired=repaired)
        case _:
            is_episode = isinstance(source, EnvironmentSource)
            return EpisodeReward() if is_episode else RuleReward(build_rule(source), source.label)


@singledispatch
def build_rule(source: SourceSection) -> Rule:
    """The rule of a config section."""
    raise TypeError(f"{source.type} is no rule")


build_rule.register(ExactMatchSource, ExactMatch)
build_rule.register(ChoiceSource, Choice)
build_rule.register(NumberSource, NumberMatch)
build_rule.register(FormatSource, ThinkFormat)
build_rule.register(LengthSource, LengthPenalty)
build_rule.register(OverlongSource, OverlongPenalty)
build_rule.register(RegexSource, PatternMatch)


def row_requirement(source: Source) -> RowRequirement | None:
    """What a source requires of every row; None if it requires nothing."""
    match source:
        case MathSource():
            return MathRequirement(source)
        case CodeSource():
            return CodeRequirement(source.tests_key)
        case JudgeSource():
            from rlhf.engines.rewards.judge import RubricRequirement  # noqa: PLC0415  imports an HTTP library: slow

            return RubricRequirement(source)
        case ModelSource() | PrmSource() | FunctionSource() | HttpSource() | EnvironmentSource():
            return None
        case _:
            return build_rule(source)


def row_problems(sources: Sequence[Source], rows: Iterable[tuple[str, str | None, Mapping[str, Json]]]) -> list[str]:
    """What rows (id, label, other columns) lack that the sources need: a line for each problem, at most
    MAX_ROW_LINES of them."""
    needs = [(source.label, need) for source in sources if (need := row_requirement(source)) is not None]
    lines = [
        row_line(row_id, name, problem)
        for row_id, label, columns in (rows if needs else ())
        for name, need in needs
        if (problem := need.row_problem(label, columns)) is not None
    ]
    return first_lines(lines)


def first_lines(lines: Sequence[str]) -> list[str]:
    """At most MAX_ROW_LINES lines about rows, and how many more there are."""
    left_out = len(lines) - MAX_ROW_LINES
    more = [f"data: {left_out} more rows like these."] if left_out > 0 else []
    return [*lines[:MAX_ROW_LINES], *more]


def build_reward(sources: Sequence[Source], opened: Mapping[str, RewardSource]) -> WeightedRewards:
    """The weighted sum of `sources`. `opened` holds those that are open already (models, remote functions), by label;
    the others are opened here. Raises ConfigError with every problem."""
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


def check_function(function: str, *, network: bool = True) -> None:
    """Import `module:name` in a child process and check that its parameters have a meaning, as far as that can be known
    without rows. Raises ConfigError."""
    process = FunctionProcess(function, network=network)
    process.close()
    if has_known_names(process.parameters):
        arguments_of(function, process.parameters, ["labels"])


def probe(
    source: RewardSource, prompt: Prompt, tokenizer: Tokenizer, *, group_size: int = 1, has_episodes: bool = False
) -> Reward:
    """Score made-up responses to a real prompt, to find a source that cannot work before a run starts: two responses
    if the run samples several (a judge compares them), else one. With `has_episodes`, each is an episode of one turn.
    Returns the reward of the first."""
    responses = PROBE_RESPONSES[:group_size]
    rollouts = [
        made_up_rollout(prompt, response, [*tokenizer.encode(response), tokenizer.eos_token_id])
        for response in responses
    ]
    if has_episodes:
        rollouts = [_as_episode(rollout, said) for rollout, said in zip(rollouts, responses, strict=True)]
    return source.score([prompt] * len(responses), responses, rollouts)[0]


def made_up_rollout(prompt: Prompt, response: str, token_ids: Sequence[int]) -> Rollout:
    """A finished response that no policy sampled, for a trial of a reward source."""
    return Rollout(
        id=f"probe/{prompt.id}/{response}",
        prompt_id=prompt.id,
        token_ids=np.array(token_ids, dtype=np.int64),
        log_probs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=-1,
    )


def _as_episode(rollout: Rollout, said: str) -> Rollout:
    episode = Episode(messages=(Message(role="assistant", content=said),), ending=Ending.ANSWER, num_turns=1)
    return EpisodeRollout.of(rollout, episode)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
