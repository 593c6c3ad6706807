"""A run over the fake cluster: the real placement, launcher, workers, pool and policy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf.actors.cluster import Cluster
from rlhf.actors.colocated import SleepMode
from rlhf.actors.launch_spec import Workers, colocated_models
from rlhf.actors.launcher import Launcher
from rlhf.actors.probed import ProbedPolicy
from rlhf.actors.rollout import RolloutPool
from rlhf.algorithms.needs import needs_of
from rlhf.config.commands import OnlineConfig
from rlhf.config.loading.load import load_config
from rlhf.engines.base import generate
from rlhf.engines.models.fresh_model import make_llama
from rlhf.launch.online import sending_policy
from rlhf.launch.rollouts import engines_sleep_during_training, rollout_pool
from rlhf.launch.specs import make_launch_spec
from rlhf.planning.edits import edited
from rlhf.planning.hardware import parse_cluster
from rlhf.planning.plan import GroupPlan, Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import place, sections
from rlhf.types import PackedTokens, Role, Rollout, RolloutRequest, Sampling
from tests.fake_cuda import cuda, fake_ray
from tests.fake_cuda.machine import Gpu, Node, Process
from tests.fake_cuda.models import FakeCore, FakePart, FrozenModel, Gathered, ShardedPolicy, Sizes
from tests.unit.planning.support import shape_of

MODEL: Mapping[str, object] = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
"""The model of the plans: Qwen3 1.7B."""
ONE = SimpleNamespace(tokens=PackedTokens(token_ids=np.arange(4), lengths=np.array([4])))
"""A micro-batch, as far as anybody looks."""
COLLECTIVE_TIMEOUT_S = 60.0
TINY = 2**20
"""Bytes: more than all buckets and tensors of the tiny model, less than anything that a plan counts."""
FLAGS = (
    *("--reward.rules", "number", "--data.path", "rows.jsonl", "--cluster.device", "cuda", "--rollout.engine", "vllm"),
    *("--rollout.sync-bucket-mib", "0.02", "--rollout.gpu-memory-utilization", "0.5"),
    *("--rollout.sync-timeout-s", "60", "--algo.kl.type", "fixed", "--algo.kl.coef", "0.01"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A cluster, and how a policy and its engines share it. Without colocation each has half of the nodes."""

    num_nodes: int
    num_gpus: int
    width: int
    """GPUs of one engine."""
    colocated: bool = True
    nodes_per_engine: int = 1
    stages: int = 1
    """Of the pipeline in each engine."""

    @property
    def num_policy_nodes(self) -> int:
        return self.num_nodes if self.colocated else self.num_nodes // 2

    @property
    def flags(self) -> list[str]:
        engines = self.num_policy_nodes * self.num_gpus // self.width
        return [
            *(text for role in ("policy", "reference") for text in self._of(role)),
            *("--rollout.num-engines", str(engines), "--rollout.tensor-parallel-size", str(self.width // self.stages)),
            *("--rollout.num-nodes-per-engine", str(self.nodes_per_engine)),
            *("--rollout.pipeline-parallel-size", str(self.stages)),
            *("--cluster.colocate", "policy,reference,rollout" if self.colocated else "policy,reference"),
        ]

    def _of(self, role: str) -> list[str]:
        nodes, gpus = str(self.num_policy_nodes), str(self.num_gpus)
        return [f"--{role}.num-nodes", nodes, f"--{role}.num-gpus-per-node", gpus]


def sizes_of(plan: Plan, unswapped: Plan) -> Sizes:
    """What each part holds on one GPU, by the plan; and by that of the same run whose optimizer states stay there."""
    (models,) = (group for group in plan.groups if Role.POLICY in group.group.roles)
    (engines,) = (group for group in plan.groups if Role.ROLLOUT in group.group.roles)
    policy, reference = (models.memory["generate"][role] for role in (Role.POLICY, Role.REFERENCE))
    engine = engines.memory["generate"][Role.ROLLOUT]
    (stay,) = (group.memory for group in unswapped.groups if Role.POLICY in group.group.roles)
    stays = stay["generate"][Role.POLICY].total
    return Sizes(
        policy=int(policy.total - policy.process),
        learning=int(stay["learn"][Role.POLICY].total - stays),
        swapped=int(stays - policy.total),
        reference=int(reference.total),
        rank_process=int(policy.process),
        engine_process=int(engine.process),
        engine_weights=int(engine.parameters),
        kv_cache=int(engine.kv_cache),
    )


@dataclass
class Run:
    """A run that has started."""

    nodes: Sequence[Node]
    plan: Plan
    cluster: Cluster
    workers: Workers
    pool: RolloutPool
    policy: ProbedPolicy
    mode: SleepMode | None
    num_prompts: int

    @property
    def gpus(self) -> list[Gpu]:
        return [gpu for node in self.nodes for gpu in node.gpus]

    def generate(self) -> list[Rollout]:
        with nullcontext() if self.mode is None else self.mode.awake():
            return generate(self.pool, requests(self.num_prompts))

    def learn(self) -> None:
        batches: Any = [ONE] * self.policy.num_ranks
        self.policy.forward_backward(batches)
        self.policy.optim_step()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the fullest GPU of models and engines that take turns becomes as full as the plan says of this phase,
        but for `TINY`: in a sync, while its engine receives weights. A GPU of one process keeps what was freed, and
        is never fuller than at the plan's peak."""
        for gpu in self.gpus:
            gpu.peak, gpu.peak_of_update = gpu.used, 0
        yield
        for group, gpus in self._gpus_of_groups():
            if group.group.is_shared_by_engines:
                peak = max(gpu.peak_of_update if name == "sync" else gpu.peak for gpu in gpus)
                planned = group.totals[name]
                if name == "sync":  # the buckets of the model that is sent are tiny
                    planned -= sum(part.gathered + part.sync for part in group.memory[name].values())
                assert abs(peak - planned) < TINY, (name, peak, planned)
            else:
                assert max(gpu.peak for gpu in gpus) < group.peak + TINY, (name, group.group.name)

    def _gpus_of_groups(self) -> list[tuple[GroupPlan, list[Gpu]]]:
        if len(self.plan.groups) == 1:
            return [(self.plan.groups[0], self.gpus)]
        half = len(self.nodes) // 2
        sides = ([gpu for node in side for gpu in node.gpus] for side in (self.nodes[:half], self.nodes[half:]))
        return list(zip(self.plan.groups, sides, strict=True))


def requests(number: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            id=f"r{index}", prompt_id=f"p{index}", prompt_token_ids=np.arange(3, 7), seed=index,
            sampling=Sampling(max_tokens=4),
        )
        for index in range(number)
    ]  # fmt: skip


@contextmanager
def started(
    shape: Shape,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *,
    environ: dict[str, str] | None = None,
    flags: Sequence[str] = (),
) -> Iterator[Run]:
    """A run on a cluster of this shape, whose nodes have `environ`, with a tiny Llama in `folder`."""
    if not (folder / "config.json").exists():
        make_llama(folder, vocab_size=64, hidden_size=32, num_layers=2, tie_embeddings=False)
    config = load_config("grpo", ["--policy.model", str(folder), *FLAGS, *shape.flags, *flags], {})
    assert isinstance(config, OnlineConfig)
    needs = needs_of(config.algo)
    hardware = parse_cluster(f"{shape.num_nodes}x{shape.num_gpus}xH100")
    shapes = dict.fromkeys(sections(config, needs), shape_of(MODEL))
    plan = plan_run(config, needs, shapes, hardware)
    assert plan.fits
    unswapped = plan_run(edited(config, {"policy.swap_optimizer": False}), needs, shapes, hardware)
    memory = int(hardware.device.memory_gib * 2**30)
    nodes = [Node(f"node{index}", shape.num_gpus, memory, environ or {}) for index in range(shape.num_nodes)]
    Process.handles.clear()
    for kind in (ShardedPolicy, FrozenModel, FakeCore, FakePart):
        patch.setattr(kind, "sizes", sizes_of(plan, unswapped), raising=False)
    install(patch, nodes)
    placement = place(config, needs)
    cluster = Cluster(config.cluster, "fake")
    try:
        spec = make_launch_spec(config, needs, placement, dict.fromkeys(needs.trains, 4), "cuda")
        launcher = Launcher(cluster, placement, spec, start_timeout_s=60.0, collective_timeout_s=60.0, on_replaced=None)
        workers = launcher.launch(lambda _sources: None)
        assert workers.engines is not None
        open_pool = partial(rollout_pool, config, colocated_models(placement, workers.groups), "cuda")
        sleeps = engines_sleep_during_training(placement, config.rollout.max_lag)
        policy = sending_policy(config, workers, open_pool, requests(2), sleeps)
        pool = open_pool(workers.engines, introduce=policy.introduce)
        mode = SleepMode(pool) if sleeps else None
        yield Run(nodes, plan, cluster, workers, pool, policy, mode, 2 * len(workers.engines.workers))
        pool.close()
    finally:
        cluster.close()


def install(patch: pytest.MonkeyPatch, nodes: Sequence[Node]) -> None:
    """The fakes take the places of CUDA, Ray, DeepSpeed and vLLM's core."""
    import deepspeed  # noqa: PLC0415

    import rlhf.engines.rollout.vllm_core  # noqa: PLC0415
    import rlhf.engines.rollout.vllm_part  # noqa: PLC0415
    import rlhf.engines.training.engine  # noqa: PLC0415
    import rlhf.engines.training.scoring  # noqa: PLC0415
    import rlhf.engines.weight_sync.zero3_source  # noqa: PLC0415

    cuda.install(patch, cuda.Groups(COLLECTIVE_TIMEOUT_S))
    fake_ray.install(patch, fake_ray.FakeRay(nodes))
    patch.setattr(deepspeed, "init_distributed", lambda **_: None)
    patch.setattr(rlhf.engines.training.engine, "DeepSpeedEngine", ShardedPolicy)
    patch.setattr(rlhf.engines.training.scoring, "ScoringEngine", FrozenModel)
    patch.setattr(rlhf.engines.rollout.vllm_core, "VllmCore", FakeCore)
    patch.setattr(rlhf.engines.rollout.vllm_part, "VllmPart", FakePart)
    fake: Any = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered))
    patch.setattr(rlhf.engines.weight_sync.zero3_source, "deepspeed", fake)
