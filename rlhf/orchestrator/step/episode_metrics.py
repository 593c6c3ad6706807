"""Metrics of responses of several turns."""

from collections.abc import Sequence

from rlhf.episode import Ending, EpisodeRollout
from rlhf.types import Rollout


def episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the episodes among responses; empty where there is none."""
    episodes = [rollout.episode for rollout in rollouts if isinstance(rollout, EpisodeRollout)]
    if not episodes:
        return {}

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(episodes)

    names = sorted({name for episode in episodes for name in episode.calls})
    num_calls = sum(episode.num_calls for episode in episodes)
    num_failed = sum(episode.num_failed_calls for episode in episodes)
    return {
        "agent/turns": mean([episode.num_turns for episode in episodes]),
        "agent/calls": num_calls / len(episodes),
        **{f"agent/calls/{name}": mean([episode.calls.get(name, 0) for episode in episodes]) for name in names},
        "agent/failed_calls": num_failed / max(num_calls, 1),
        "agent/world_tokens": mean([episode.num_world_tokens for episode in episodes]),
        "agent/segments": mean([episode.num_segments for episode in episodes]),
        "agent/seals": mean([episode.num_segments - 1 + (episode.ending is Ending.SEALED) for episode in episodes]),
        "agent/out_of_turns": mean([episode.ending is Ending.MAX_TURNS for episode in episodes]),
        "agent/failed": mean([episode.ending is Ending.FAILED for episode in episodes]),
        "agent/retries": float(sum(episode.num_retries for episode in episodes)),
        "throughput/world_seconds": mean([episode.world_s for episode in episodes]),
    }
