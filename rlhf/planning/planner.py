"""From a config, its models and a cluster to the run's plan."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil

from rlhf.algorithms.needs import Needs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.models import ModelSection, TrainedModelSection, dtype_on
from rlhf.config.rollout import RolloutSection
from rlhf.errors import ConfigError
from rlhf.planning import memory, timing
from rlhf.planning.calibration import ENGINE, MODELS, NONE, Calibration
from rlhf.planning.hardware import GIB, ClusterShape
from rlhf.planning.layout import Bundle, lay_out
from rlhf.planning.memory import Memory, ModelLoad
from rlhf.planning.model_shape import ModelShape
from rlhf.planning.placement import DeviceGroup, Placement
from rlhf.planning.plan import PHASES, GroupPlan, Plan
from rlhf.planning.roles import place, sections
from rlhf.planning.timing import USUAL, Efficiency, Machine
from rlhf.planning.workload import LIMITS, Lengths, Workload, workload
from rlhf.types import Role

MIB = 2**20
GPU_PROCESS = 1.3 * GIB
"""A CUDA context, its kernels and NCCL's buffers."""
CUDA_GRAPHS = 1.0 * GIB
"""CUDA graphs of a rollout engine, which stay on the device in sleep mode. vLLM logs 0.2 to 1.5 GiB, by the model."""
CPU_PROCESS = 0.55 * GIB
"""torch, transformers, DeepSpeed and Ray in one process."""
BYTES = {"float32": 4, "bfloat16": 2}
TOKEN_STEP = 256
MAX_STEPS = 2**16
"""Of `TOKEN_STEP` tokens: longer sequences than any model takes."""


def plan_run(
    config: TrainConfig,
    needs: Needs,
    shapes: Mapping[Role, ModelShape],
    cluster: ClusterShape,
    *,
    lengths: Lengths = LIMITS,
    rates: Efficiency = USUAL,
    calibration: Calibration = NONE,
) -> Plan:
    """Plan a resolved config on an empty cluster.

    `shapes` holds the model of every role that the run starts, with its original head.

    Raises:
        ConfigError: the placement does not fit on the nodes (names each bundle that finds no place), or attention heads
            or experts do not split.
    """
    placement = place(config, needs)
    bundles = lay_out(placement, [cluster.devices_per_node] * cluster.num_nodes)
    work = workload(config, needs, lengths)
    planner = _Planner(config, needs, shapes, cluster, placement, work, rates, calibration)
    groups = tuple(
        planner.group(group, tuple(bundle for bundle in bundles if bundle.group is group)) for group in placement.groups
    )
    return Plan(
        cluster=cluster,
        placement=placement,
        groups=groups,
        shapes=shapes,
        work=work,
        overlaps=config.max_lag > 0,
        cache_tokens=planner.cache_tokens() if config.is_online else 0.0,
        cache_wanted=planner.cache_wanted() if config.is_online else 0.0,
        other_s=calibration.other_s,
        find_fitting_tokens=planner.fitting_tokens,
    )


class _Planner:
    """What the plans of all groups share."""

    def __init__(
        self,
        config: TrainConfig,
        needs: Needs,
        shapes: Mapping[Role, ModelShape],
        cluster: ClusterShape,
        placement: Placement,
        work: Workload,
        rates: Efficiency,
        calibration: Calibration,
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._work = work
        self._rates = rates
        self._calibration = calibration
        self._device = "cpu" if cluster.device.is_cpu else "cuda"
        scalar = {Role.CRITIC, Role.REWARD}
        self.shapes = {role: shape.as_scorer() if role in scalar else shape for role, shape in shapes.items()}
        self._exported = needs.exported_role
        self._sections = sections(config, needs)
        self._loads = {
            role: self._load(role, section, learns=role in needs.trains) for role, section in self._sections.items()
        }
        self._placement = placement

    def _load(self, role: Role, section: ModelSection, *, learns: bool) -> ModelLoad:
        shape = self.shapes[role]
        trained = section if isinstance(section, TrainedModelSection) and learns else None
        dtype = dtype_on(section.dtype, self._device)
        size = section.sequence_parallel_size
        if shape.num_heads % size:
            text = f"{shape.num_heads} attention heads do not split over {size} processes."
            raise ConfigError(f"{role}.sequence_parallel_size: {text}")
        holders = 1 if trained is None else trained.expert_parallel_size
        if shape.num_experts % holders:
            text = f"{shape.num_experts} experts do not split over {holders} processes."
            raise ConfigError(f"{role}.expert_parallel_size: {text}")
        return ModelLoad(
            shape=shape,
            num_ranks=section.num_ranks,
            dtype_bytes=BYTES[dtype],
            learns=learns,
            zero_stage=section.stage_on(section.num_ranks, is_float32=dtype == "float32"),
            hpz_size=section.zero_hpz_partition_size,
            in_four_bits=section.quantization != "none",
            offload_parameters=section.offload_parameters,
            offload_optimizer=trained is not None and trained.offload_optimizer,
            swap_optimizer=trained is not None and trained.swap_optimizer,
            gradient_checkpointing=trained is not None and bool(trained.gradient_checkpointing),
            offload_activations=trained is not None and trained.gradient_checkpointing == "offload",
            mlp_chunk_tokens=section.mlp_chunk_tokens,
            chunk_tokens=1024 if trained is None else trained.log_probs_chunk_tokens,
            sequence_parallel=size,
            expert_parallel=holders,
            kept_log_probs=0.0 if trained is None else trained.log_probs_kept_mib * 2**20,
            adapter_rank=0 if trained is None else trained.lora.rank,
            adapts_experts=trained is not None and trained.lora.rank > 0 and len(trained.lora.expert_targets) > 0,
            on_cpu=self._cluster.device.is_cpu,
        )

    def group(self, group: DeviceGroup, bundles: tuple[Bundle, ...]) -> GroupPlan:
        models = [role for role in group.roles if role != Role.ROLLOUT]
        each = group.shape.num_devices_per_node
        fixed = {phase: self._seconds(group, phase, timing.boundless(self._rates)) for phase in self._phases()}
        return GroupPlan(
            group=group,
            bundles=bundles,
            memory={phase: self._held(group, phase, self._work.micro_batch_tokens) for phase in self._phases()},
            host_bytes=(self._offloaded(models) + self._asleep(group)) * each + self._routes(group, bundles),
            reading_bytes=max((memory.reading(self._loads[role]) for role in models), default=0.0),
            exporting_bytes=memory.exporting(self._loads[self._exported]) if self._exported in models else 0.0,
            resuming_bytes=max((memory.resuming(self._loads[role]) for role in models), default=0.0) * each,
            seconds={
                phase: self._calibration.time(phase, self._seconds(group, phase, self._rates), fixed[phase])
                for phase in self._phases()
            },
            fixed_seconds=fixed,
            capacity=self._cluster.capacity_gib * GIB,
        )

    def _offloaded(self, models: Sequence[Role]) -> float:
        """Bytes of host memory for what a process offloads of its models. They learn one after the other."""
        tokens = self._work.micro_batch_tokens
        activations = max((memory.host_activations(self._loads[role], tokens) for role in models), default=0.0)
        return sum(memory.host(self._loads[role]) for role in models) + activations

    def _held(self, group: DeviceGroup, phase: str, num_tokens: int) -> dict[Role, Memory]:
        """What each role of a group holds on one device, where micro-batches have this many tokens."""
        models: list[Role] = [role for role in group.roles if role != Role.ROLLOUT]
        passing = {role: self._transient(role, phase, num_tokens) for role in models if role in self._active(phase)}
        widest = max(passing, key=lambda role: passing[role].total, default=None)
        held = {
            role: (memory.resident(self._loads[role]) + (passing[role] if role == widest else Memory())).times(
                self._calibration.memory_factors.get(MODELS, 1.0)
            )
            + Memory(process=self._process(Role.POLICY) if role == models[0] else 0.0)
            for role in models
        }
        if Role.ROLLOUT in group.roles:
            held[Role.ROLLOUT] = self._engine(phase, shares=bool(models))
        return held

    def fitting_tokens(self) -> int:
        """Tokens of the largest micro-batch, or longest sequence, for which every device has the memory, in steps of
        `TOKEN_STEP`; 0 if there is none. Without GPUs all processes share the machine's memory."""
        capacity = self._cluster.capacity_gib * GIB

        def fits(steps: int) -> bool:
            peaks = [
                (max(self._size(group, phase, steps * TOKEN_STEP) for phase in self._phases()), group.shape.num_devices)
                for group in self._placement.groups
            ]
            together = sum(peak * number for peak, number in peaks)
            shared = self._cluster.device.is_cpu and together > self._cluster.num_nodes * capacity
            return not shared and all(peak <= capacity for peak, _ in peaks)

        return TOKEN_STEP * bisect_left(range(1, MAX_STEPS), True, key=lambda steps: not fits(steps))

    def _size(self, group: DeviceGroup, phase: str, num_tokens: int) -> float:
        return sum(part.total for part in self._held(group, phase, num_tokens).values())

    def _phases(self) -> Sequence[str]:
        return PHASES if self._work.sampled else ("learn",)

    def _active(self, phase: str) -> frozenset[Role]:
        """Models that compute in a phase."""
        match phase:
            case "score":
                return frozenset({Role.REWARD} if self._work.scored else ())
            case "log_probs":
                return self._work.measured
            case "learn":
                return frozenset(role for role, load in self._loads.items() if load.learns)
            case "sync":
                return frozenset({Role.POLICY})
            case _:
                return frozenset()

    def _transient(self, role: Role, phase: str, num_tokens: int) -> Memory:
        load = self._loads[role]
        match phase:
            case "learn":
                return memory.learning(load, num_tokens)
            case "sync":
                return memory.sending(load, self._bucket)
            case _:
                return memory.forward(load, num_tokens)

    @property
    def _bucket(self) -> float:
        """Bytes."""
        return self._rollout.sync_bucket_mib * MIB

    def _process(self, role: Role) -> float:
        if not self._cluster.device.is_cpu:
            return GPU_PROCESS
        return self._rollout.expected_traits.cpu_process_gib * GIB if role == Role.ROLLOUT else CPU_PROCESS

    @property
    def _rollout(self) -> RolloutSection:
        assert isinstance(self._config, OnlineConfig)
        return self._config.rollout

    def _engine(self, phase: str, *, shares: bool) -> Memory:
        """One device of an engine. On shared GPUs it is in sleep mode, unless it samples during training: it is awake
        while it samples, and has weights without a KV cache while it receives new ones. On CPU it keeps its memory."""
        process = Memory(process=self._process(Role.ROLLOUT) + self._graphs())
        sleeps = shares and self._sleeps()
        if sleeps and phase not in ("generate", "sync"):
            return process
        copies = self._rollout.expected_traits.cpu_weight_copies if self._cluster.device.is_cpu else 1
        held = Memory(
            parameters=self._engine_weights() * copies,
            kv_cache=0.0 if sleeps and phase == "sync" else self._cache_bytes(),
            sync=memory.receiving(self._loads[Role.POLICY], self._bucket) if phase == "sync" else 0.0,
        )
        return held.times(self._calibration.memory_factors.get(ENGINE, 1.0)) + process

    def _sleeps(self) -> bool:
        """Whether engines that share devices with models sleep while these compute."""
        return not self._cluster.device.is_cpu and not self._rollout.max_lag

    def _asleep(self, group: DeviceGroup) -> float:
        """Bytes of host memory that hold the weights of one device's engine while it sleeps."""
        shares = Role.ROLLOUT in group.roles and len(group.roles) > 1
        return self._engine_weights() if shares and self._sleeps() else 0.0

    def _routes(self, group: DeviceGroup, bundles: Sequence[Bundle]) -> float:
        """Bytes of a node's host memory that hold which experts tokens used: of the KV caches of its engines; of the
        steps under way, and a packed copy of one of them, on nodes of the policy."""
        if not isinstance(self._config, OnlineConfig) or not self._rollout.router_replay:
            return 0.0
        tokens = 0.0
        if Role.ROLLOUT in group.roles:
            tokens += self.cache_tokens() * max(Counter(bundle.node for bundle in bundles).values())
        if Role.POLICY in group.roles:
            tokens += (self._rollout.max_lag + 2) * self._work.sampled_tokens
        return memory.routes(self.shapes[Role.POLICY]) * tokens

    def _graphs(self) -> float:
        return 0.0 if self._cluster.device.is_cpu or self._rollout.enforce_eager else CUDA_GRAPHS

    def _engine_weights(self) -> float:
        """Of one device, in bytes."""
        policy, rollout = self._loads[Role.POLICY], self._rollout
        return memory.stage_weights(
            policy.shape, policy.dtype_bytes, rollout.tensor_parallel_size, rollout.pipeline_parallel_size
        )

    def _cache_bytes(self) -> float:
        """KV cache of one device: what vLLM leaves of its share of the memory, or on CPU what the config says."""
        rollout, sheet = self._rollout, self._cluster.device
        if sheet.is_cpu:
            return rollout.kv_cache_gib * GIB
        other = self._engine_weights() + GPU_PROCESS + self._graphs()
        return max(0.0, rollout.gpu_memory_utilization * sheet.memory_gib * GIB - other)

    def cache_tokens(self) -> float:
        """Tokens that fit into the KV cache of one engine."""
        policy, rollout = self._loads[Role.POLICY], self._rollout
        parallel, stages = rollout.tensor_parallel_size, rollout.pipeline_parallel_size
        return self._cache_bytes() / memory.kv_cache(policy.shape, policy.dtype_bytes, parallel, stages, 1)

    def cache_wanted(self) -> float:
        """Tokens of the longest sequences that one engine decodes at once."""
        rollout = self._rollout
        num_seqs = min(rollout.max_num_seqs_on(self._device), ceil(self._work.sampled / rollout.num_engines))
        return num_seqs * float(self._work.longest)

    def _seconds(self, group: DeviceGroup, phase: str, rates: timing.Efficiency) -> float:
        machine = Machine(sheet=self._cluster.device, num_nodes=group.shape.num_nodes)
        work = self._work
        policy = self._loads.get(Role.POLICY)
        if Role.ROLLOUT in group.roles and phase == "generate":
            assert policy is not None
            return self._generation(policy, rates)
        active = [self._loads[role] for role in group.roles if role in self._active(phase)]
        match phase:
            case "score":
                return sum(timing.scoring(load, work.sampled_tokens, work, machine, rates) for load in active)
            case "log_probs":
                return sum(timing.scoring(load, work.learned_tokens, work, machine, rates) for load in active)
            case "learn":
                return sum(timing.learning(load, work, machine, rates) for load in active)
            case "sync" if policy is not None and {Role.POLICY, Role.ROLLOUT} & set(group.roles):
                shared = Role.ROLLOUT in self._placement.group_of(Role.POLICY).roles
                return timing.sync(self._synced_bytes(policy), same_device=shared, machine=machine, rates=rates)
            case _:
                return 0.0

    def _synced_bytes(self, policy: ModelLoad) -> float:
        adapters_alone = self._rollout.sync_adapters
        return policy.learned_parameters * policy.dtype_bytes if adapters_alone else policy.parameter_bytes

    def _generation(self, policy: ModelLoad, rates: timing.Efficiency) -> float:
        rollout = self._rollout
        fitting = max(1, int(self.cache_tokens() // self._work.sequence_tokens))
        return timing.generation(
            policy.shape,
            policy.dtype_bytes,
            self._work,
            timing.Engines(
                number=rollout.num_engines,
                tensor_parallel=rollout.tensor_parallel_size,
                stages=rollout.pipeline_parallel_size,
                num_nodes=rollout.num_nodes_per_engine,
                max_seqs=min(rollout.max_num_seqs_on(self._device), fitting),
            ),
            sheet=self._cluster.device,
            rates=rates,
        )
