"""Metrics of what was sampled, whether it is trained on or not."""

from collections.abc import Sequence

from rlhf.orchestrator.step.episode_metrics import episode_metrics
from rlhf.types import FinishReason, Reward, ScoredGroup


def logged_means(rewards: Sequence[Reward]) -> dict[str, float]:
    """What reward functions reported by `rlhf.log`: the mean of each name over the responses whose call logged it."""
    names = sorted({name for reward in rewards for name in reward.logged})
    found = {name: [reward.logged[name] for reward in rewards if name in reward.logged] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def describe_sampled(groups: Sequence[ScoredGroup], num_kept: int) -> dict[str, float]:
    """Metrics of everything that was sampled, whether it is trained on or not."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    if not rollouts:
        return {}
    totals = [reward.total for reward in rewards if reward.is_scored]
    names = sorted({name for reward in rewards for name in reward.parts})
    parts = {name: [reward.parts[name] for reward in rewards if name in reward.parts] for name in names}
    greedy = [group.baseline for group in groups if group.baseline is not None]
    baselines = [one.reward.total for one in greedy if one.reward.is_scored]
    drawn = [*rollouts, *(one.rollout for one in greedy)]
    return {
        **({"reward/mean_all": sum(totals) / len(totals)} if totals else {}),
        "reward/unscored": 1.0 - len(totals) / len(rewards),
        **{f"reward/source/{name}": sum(values) / len(values) for name, values in parts.items()},
        **{f"reward/{name}": mean for name, mean in logged_means(rewards).items()},
        **({"rollout/baseline": sum(baselines) / len(baselines)} if baselines else {}),
        "rollout/tokens": float(sum(len(rollout.token_ids) for rollout in drawn)),
        "rollout/aborted": sum(rollout.finish_reason is FinishReason.ABORTED for rollout in rollouts) / len(rollouts),
        "rollout/groups_dropped": float(len(groups) - num_kept),
        **episode_metrics(drawn),
    }
