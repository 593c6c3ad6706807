"""How responses of a step are shown to a person: the best and the worst of a group, with its label."""

from collections.abc import Sequence

from rlhf.episode import EpisodeRollout, shown
from rlhf.terminal import visible
from rlhf.types import ScoredGroup

SAMPLE_CHARACTERS = 600


def most_telling(groups: Sequence[ScoredGroup]) -> ScoredGroup:
    """The group whose rewards differ most: the first of equals."""
    return max(groups, key=_spread)


def sample_lines(step: int, group: ScoredGroup) -> list[str]:
    """A group's prompt with its label, and its best and worst response; one response where all got the same."""
    label = f", label [{_short(group.prompt.label)}]" if group.prompt.label is not None else ""
    lines = [f"sample of step {step}: [{_short(group.prompt.text)}]{label}"]
    scored = [i for i, reward in enumerate(group.rewards) if reward.is_scored]
    if not scored:
        return [*lines, f"  no score: [{_said(group, 0)}]"]
    best = max(scored, key=lambda i: group.rewards[i].total)
    worst = min(scored, key=lambda i: group.rewards[i].total)
    reward = f"{group.rewards[best].total:.4g}"
    if group.rewards[best].total == group.rewards[worst].total:
        which = f"all {len(scored)} got reward {reward}, the first" if len(scored) > 1 else f"reward {reward}"
        return [*lines, f"  {which}: [{_said(group, best)}]"]
    return [
        *lines,
        f"  best, reward {reward}: [{_said(group, best)}]",
        f"  worst, reward {group.rewards[worst].total:.4g}: [{_said(group, worst)}]",
    ]


def _said(group: ScoredGroup, index: int) -> str:
    """A response; one of several turns with who said what."""
    response = group.responses[index]
    if not isinstance(response, EpisodeRollout):
        return _short(group.texts[index])
    return _short("\n".join(f"{said.role}: {shown(said)}" for said in response.episode.messages))


def _spread(group: ScoredGroup) -> float:
    totals = [reward.total for reward in group.rewards if reward.is_scored]
    return max(totals) - min(totals) if totals else -1.0


def _short(text: str) -> str:
    escaped = visible(text)
    return escaped if len(escaped) <= SAMPLE_CHARACTERS else escaped[:SAMPLE_CHARACTERS] + " ..."
