"""The reward sources of an online run, and the deadline of scoring."""

from collections.abc import Mapping

from rlhf.actors.groups import WorkerGroup
from rlhf.actors.reward import RemoteReward
from rlhf.config.reward import EndpointSource, EnvironmentSource, RemoteSource, RewardSection, StartedSource
from rlhf.engines.base import RewardSource, Tokenizer, TokenScorer
from rlhf.engines.rewards import build_reward, build_scored, probe
from rlhf.planning.roles import model_of
from rlhf.repair import Repaired
from rlhf.types import Prompt, Role


def remote_rewards(groups: Mapping[str, WorkerGroup], timeout_s: float, repaired: Repaired) -> dict[str, RewardSource]:
    """The reward sources that run in workers of their own, by label."""
    return {label: RemoteReward(group, timeout_s=timeout_s, repaired=repaired) for label, group in groups.items()}


def model_reward(
    source: StartedSource, scorer: TokenScorer, policy_tokenizer: Tokenizer, max_tokens_per_batch: int
) -> RewardSource:
    """The reward model, computed by `scorer`, as a reward source."""
    from rlhf.engines.models.text_pairs import load_reward_tokenizer  # noqa: PLC0415  imports transformers

    return build_scored(
        source,
        scorer,
        policy_tokenizer=policy_tokenizer,
        reward_tokenizer=load_reward_tokenizer(source, model_of(source, Role.REWARD), key="reward.model"),
        max_tokens_per_batch=max_tokens_per_batch,
    )


def probe_local_rewards(
    section: RewardSection,
    opened: Mapping[str, RewardSource],
    prompt: Prompt,
    tokenizer: Tokenizer,
    num_responses: int,
) -> None:
    """Score made-up responses by every source that runs in the driver."""
    tried_later = RemoteSource | EnvironmentSource
    if sources := [source for source in section.all_sources if not isinstance(source, tried_later)]:
        probe(build_reward(sources, opened), prompt, tokenizer, group_size=num_responses)


def scoring_timeout_s(section: RewardSection, step_timeout_s: float) -> float:
    """Longest wait for the rewards of a step. It is longer than the allowed outage of a service, whose error is more
    precise and therefore must come first."""
    outages = (source.outage_timeout_s for source in section.all_sources if isinstance(source, EndpointSource))
    return step_timeout_s + sum(outages)
