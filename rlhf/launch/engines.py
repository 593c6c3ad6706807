"""The started workers as engines: what the loop calls to compute and to train."""

from rlhf.actors.groups import EmaReferenceEngine, GroupEngine, WorkerGroup
from rlhf.actors.launch_spec import Workers
from rlhf.actors.memory import MemoryGauge
from rlhf.types import Role


def role_engine(workers: Workers, role: Role, timeout_s: float) -> GroupEngine:
    """The workers of one role as an engine. `timeout_s` is the deadline of each call."""
    return GroupEngine(
        workers.groups[role],
        role,
        step_timeout_s=timeout_s,
        sync_timeout_s=timeout_s,
        sequence_parallel_size=workers.sequence_parallel.get(role, 1),
    )


def ema_reference_engine(workers: Workers, timeout_s: float) -> EmaReferenceEngine:
    """The EMA reference: a copy of the policy in the policy's own workers. `timeout_s` is the deadline of each call."""
    return EmaReferenceEngine(
        workers.groups[Role.POLICY],
        Role.POLICY,
        step_timeout_s=timeout_s,
        sync_timeout_s=timeout_s,
        sequence_parallel_size=workers.sequence_parallel.get(Role.POLICY, 1),
    )


def memory_gauge(workers: Workers, timeout_s: float) -> MemoryGauge:
    """Reads the peak memory of all workers, by their roles. `timeout_s` is the deadline of a reading."""
    groups: dict[str, WorkerGroup] = {}
    for group in dict.fromkeys(workers.groups.values()):
        groups["+".join(role for role, other in workers.groups.items() if other is group)] = group
    if workers.engines is not None:
        groups[Role.ROLLOUT] = workers.engines
    return MemoryGauge(groups=groups, timeout_s=timeout_s)
