"""Where the policy's weights go after a step, and how old those may be that sampled its rollouts."""

from collections.abc import Callable

from rlhf.algorithms.base import Needs
from rlhf.errors import RlhfError, WeightSyncError
from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import Role


class PolicyWeights:
    """Sends the policy's weights to the rollout engines and to an EMA reference, where the algorithm has them."""

    def __init__(self, needs: Needs, models: Models, warn: Callable[[str], None]) -> None:
        self._needs = needs
        self._models = models
        self._warn = warn

    def sync(self, version: int) -> dict[str, float]:
        """Make the weights live in the rollout engines as `version`. Returns metrics.

        Raises:
            WeightSyncError: the engines have another version afterwards.
        """
        if not self._needs.online:
            return {}
        report = self._models.trained[Role.POLICY].send_weights(version)
        if report.version != version:
            raise WeightSyncError(f"sync: version {version} was sent, {report.version} is live")
        return {"sync/seconds": report.seconds, "sync/bytes": float(report.num_bytes)}

    def is_ema_due(self, step: int) -> bool:
        """Whether the EMA reference is updated after `step`."""
        ema_reference = self._needs.ema_reference
        return ema_reference is not None and step % ema_reference.every_steps == 0

    def update_ema_reference(self, step: int) -> dict[str, float]:
        """Move the EMA reference toward the policy. Returns metrics; a reference that did not move is a warning."""
        assert self._needs.ema_reference is not None
        assert self._models.ema_reference is not None
        moved = self._models.ema_reference.update_ema()
        if not moved and self._needs.ema_reference.decay < 1.0:
            self._warn(f"step {step}: the reference was updated from the policy, and did not move")
        return {"reference/moved": moved, "reference/version": float(step)}


def require_lag(step: int, batch: GroupBatch, max_lag: int) -> None:
    """Check that step `step`, whose policy has version step - 1, learns from rollouts of that version or of one of the
    `max_lag` before it. Greedy baselines may be older: none of their tokens is learned from.

    Raises:
        RlhfError: a rollout is older, or newer.
    """
    for rollout in (rollout for group in batch.groups for rollout in group.rollouts):
        if rollout.is_sampled and not 0 <= step - 1 - rollout.weight_version <= max_lag:
            raise RlhfError(
                f"step {step}: {rollout.id} was sampled from weights of version {rollout.weight_version}, the "
                f"policy is at {step - 1}; at most {max_lag} versions of lag are allowed"
            )
