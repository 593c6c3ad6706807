"""Checks the scores of a source: one finite number for each response."""

import math
from collections.abc import Sequence

from rlhf.errors import RewardError
from rlhf.types import Json


def checked_scores(scores: Sequence[Json], prompt_ids: Sequence[str], *, where: str = "reward") -> list[float]:
    """The scores as floats. Raises RewardError naming the first prompt whose score is not a finite number."""
    if len(scores) != len(prompt_ids):
        count = f"{len(scores)} or more" if len(scores) > len(prompt_ids) else len(scores)
        raise RewardError(
            f"{where}: got {count} scores for {len(prompt_ids)} samples (prompt ids {listed(prompt_ids)})."
        )
    checked = [_finite(score) for score in scores]
    for score, given, prompt_id in zip(checked, scores, prompt_ids, strict=True):
        if score is None:
            raise RewardError(f"{where}: score for {prompt_id} is not a finite number (got {_shown(given)}).")
    return [score for score in checked if score is not None]


def listed(prompt_ids: Sequence[str]) -> str:
    """Prompt ids in short: `p12`, `p12, p13` or `p12..p15`."""
    distinct = list(dict.fromkeys(prompt_ids))
    return ", ".join(distinct) if len(distinct) < 3 else f"{distinct[0]}..{distinct[-1]}"


def _finite(score: Json) -> float | None:
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    try:
        number = float(score)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(score: Json) -> str:
    if isinstance(score, float):
        return "NaN" if math.isnan(score) else str(score)
    return str(score)[:60]
