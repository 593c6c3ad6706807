"""Penalties on length, counted in tokens that the model itself generated."""

from collections.abc import Mapping

from rlhf.config.reward import LengthSource, OverlongSource
from rlhf.errors import ConfigError
from rlhf.types import Json, Prompt, Rollout


def num_model_tokens(rollout: Rollout) -> int:
    """Tokens that the model generated, without those that an environment or a tool returned."""
    return len(rollout.token_ids) if rollout.loss_mask is None else int(rollout.loss_mask.sum())


class LengthPenalty:
    """-per_token for each token beyond `limit`."""

    def __init__(self, section: LengthSource) -> None:
        if section.limit is None:
            raise ConfigError("reward.sources: length needs a limit.")
        self._limit = section.limit
        self._per_token = section.per_token

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        return None

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        return -self._per_token * max(0, num_model_tokens(rollout) - self._limit)


class OverlongPenalty:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13) for a response of n tokens:

    0 if n <= limit - buffer; (limit - buffer - n) / buffer if n <= limit; else -1.
    """

    def __init__(self, section: OverlongSource) -> None:
        if section.limit is None or section.buffer is None:
            raise ConfigError("reward.sources: overlong needs a limit and a buffer.")
        self._free = section.limit - section.buffer
        self._buffer = section.buffer

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        return None

    def score(self, prompt: Prompt, response: str, rollout: Rollout) -> float:
        excess = num_model_tokens(rollout) - self._free
        return -min(max(excess, 0) / self._buffer, 1.0)
