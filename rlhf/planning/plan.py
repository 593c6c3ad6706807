"""A run's plan: its groups on nodes, the memory of each device phase by phase, and the time of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rlhf.planning.hardware import GIB, ClusterShape
from rlhf.planning.layout import Bundle
from rlhf.planning.memory import Memory
from rlhf.planning.model_shape import ModelShape
from rlhf.planning.placement import DeviceGroup, Placement
from rlhf.planning.workload import Workload
from rlhf.types import Role

PHASES = ("generate", "score", "log_probs", "learn", "sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One group of devices."""

    group: DeviceGroup
    bundles: tuple[Bundle, ...]
    memory: Mapping[str, Mapping[Role, Memory]]
    """Phase -> the most that each role holds on one device."""
    host_bytes: float
    """Of one node, for what is offloaded."""
    reading_bytes: float
    """Host memory of the first node while rank 0 loads the largest model for all ranks."""
    exporting_bytes: float
    """Host memory of the first node while rank 0 exports the trained model; 0 in groups that hold another."""
    resuming_bytes: float
    """Host memory of one node while its ranks read the largest of their checkpoints."""
    seconds: Mapping[str, float]
    """Phase -> seconds in which the group's devices are busy."""
    fixed_seconds: Mapping[str, float]
    """The part of `seconds` that does not depend on the speed of the devices: launching, scheduling, sampling."""
    capacity: float
    """Bytes of one device."""

    @property
    def processes(self) -> Mapping[str, float]:
        """Peak bytes of one process, by the roles that it hosts: models together, an engine alone."""
        return {
            name: max(sum(held[role].total for role in roles) for held in self.memory.values())
            for name, roles in self._hosted.items()
        }

    @property
    def libraries(self) -> Mapping[str, float]:
        """The part of `processes` that is there without a model."""
        held = next(iter(self.memory.values()))
        return {name: sum(held[role].process for role in roles) for name, roles in self._hosted.items()}

    @property
    def _hosted(self) -> Mapping[str, list[Role]]:
        models: list[Role] = [role for role in self.group.roles if role != Role.ROLLOUT]
        model_roles = {"+".join(models): models} if models else {}
        if Role.ROLLOUT in self.group.roles:
            model_roles[Role.ROLLOUT] = [Role.ROLLOUT]
        return model_roles

    @property
    def totals(self) -> Mapping[str, float]:
        """Phase -> bytes of one device."""
        return {phase: sum(part.total for part in roles.values()) for phase, roles in self.memory.items()}

    @property
    def peak_phase(self) -> str:
        totals = self.totals
        return max(totals, key=lambda phase: totals[phase])

    @property
    def peak(self) -> float:
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole run."""

    cluster: ClusterShape
    placement: Placement
    groups: tuple[GroupPlan, ...]
    shapes: Mapping[Role, ModelShape]
    """The model of every role that the run starts."""
    work: Workload
    overlaps: bool
    """Asynchronous: rollouts of the next step run during training (max_lag above 0)."""
    cache_tokens: float = 0.0
    """Tokens that fit into the KV cache of one engine."""
    cache_wanted: float = 0.0
    """Tokens of the longest sequences that one engine decodes at once."""
    other_s: float = 0.0
    """Seconds of a step outside the phases."""
    find_fitting_tokens: Callable[[], int] = field(default=int, compare=False, repr=False)
    """Finds `fitting_tokens`, which takes longer than the rest of the plan: a search has no use for it."""

    @property
    def fitting_tokens(self) -> int:
        """Tokens of the largest micro-batch, or the longest sequence, for which the devices have the memory."""
        return self.find_fitting_tokens()

    @property
    def seconds(self) -> Mapping[str, float]:
        """Phase -> seconds. Groups work in parallel."""
        return {phase: max(group.seconds.get(phase, 0.0) for group in self.groups) for phase in PHASES}

    @property
    def fixed_seconds(self) -> Mapping[str, float]:
        """Phase -> the part of its seconds that does not depend on the speed of the devices."""
        slowest = {phase: max(self.groups, key=lambda one: one.seconds.get(phase, 0.0)) for phase in PHASES}
        return {phase: group.fixed_seconds.get(phase, 0.0) for phase, group in slowest.items()}

    @property
    def processes(self) -> Mapping[str, float]:
        """`GroupPlan.processes` of all groups."""
        return {name: size for group in self.groups for name, size in group.processes.items()}

    @property
    def libraries(self) -> Mapping[str, float]:
        """`GroupPlan.libraries` of all groups."""
        return {name: size for group in self.groups for name, size in group.libraries.items()}

    @property
    def step_s(self) -> float:
        phases = self.seconds
        rollouts = phases["generate"] + phases["score"]
        rest = phases["log_probs"] + phases["learn"] + phases["sync"]
        return self.other_s + (max(rollouts, rest) if self.overlaps else rollouts + rest)

    @property
    def tokens_per_s(self) -> float:
        """Prompt and response tokens that a step learns from, for each second of the step."""
        return self.work.learned_tokens / self.step_s

    @property
    def idle_share(self) -> float:
        """Share of the device-seconds of a step in which devices wait for others."""
        busy = sum(sum(group.seconds.values()) * group.group.shape.num_devices for group in self.groups)
        return max(0.0, 1.0 - busy / (self.step_s * self.placement.num_devices))

    @property
    def fits(self) -> bool:
        alone = all(group.fits for group in self.groups) and self.cache_tokens_suffice
        return alone and not self.short_of_host and not self.short_of_memory

    @property
    def short_of_host(self) -> bool:
        return self.peak_host_bytes > self.cluster.host_gib_per_node * GIB

    @property
    def peak_host_bytes(self) -> float:
        """Of the node that needs most: models while they are loaded, or afterwards what is offloaded, with what a
        checkpoint or an export takes."""
        return max(
            max(self.host_bytes(node) + self.storing_bytes(node), self._reading_bytes(node))
            for node in range(self.cluster.num_nodes)
        )

    @property
    def peak(self) -> float:
        """Bytes of all devices together, each at its peak."""
        return sum(group.peak * group.group.shape.num_devices for group in self.groups)

    @property
    def short_of_memory(self) -> bool:
        """Without GPUs, all processes share the node's memory."""
        return self.cluster.device.is_cpu and self.peak > self.cluster.num_nodes * self.cluster.capacity_gib * GIB

    @property
    def cache_tokens_suffice(self) -> bool:
        """Whether one longest sequence fits into the KV cache."""
        return not self.work.sampled or self.cache_tokens >= self.work.longest

    def host_bytes(self, node: int) -> float:
        """Of a node, for what is offloaded to it."""
        return sum(group.host_bytes for group in self._groups_on(node))

    def storing_bytes(self, node: int) -> float:
        """Of a node, besides what is offloaded to it: the most that resuming or an export takes for a moment. Models
        resume one after the other."""
        exporting = [group.exporting_bytes for group in self.groups if group.bundles[0].node == node]
        return max([*exporting, *(group.resuming_bytes for group in self._groups_on(node))], default=0.0)

    def _groups_on(self, node: int) -> list[GroupPlan]:
        return [group for group in self.groups if any(bundle.node == node for bundle in group.bundles)]

    def _reading_bytes(self, node: int) -> float:
        return sum(group.reading_bytes for group in self.groups if group.bundles[0].node == node)
