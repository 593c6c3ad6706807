"""The training engine without Ray and vLLM: ZeRO stages, log-probs, optimizer swap, memory beside the plan, MFU."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from benchmarks.gpu_day.ranks import TIMEOUT_S, run_ranks
from benchmarks.gpu_day.setting import VOCABULARY, Figures, Setting
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Objective
from rlhf.config.algo import SftSection
from rlhf.config.loading.load import load_config
from rlhf.config.models import TrainedModelSection
from rlhf.engines.process.device_memory import peak_device_memory
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.process_memory import peak_memory
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.optimizer_swap import OptimizerSwap
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.launch.gpu_budget import training_flops
from rlhf.launch.local_gpus import local_gpus
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.planning.cluster_shape import sheet_of
from rlhf.planning.hardware import GIB, SHEETS, TERA, ClusterShape
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import local_config_json, shapes_of
from rlhf.types import Experience, Head, LearnedSequence, PackedTokens, Role

STEPS = 3
STAGES = (0, 1, 2, 3)
ROUNDING = 0.005
"""How far the gradient norms of two ZeRO stages may be apart in bfloat16, as a share: they add in another order."""
LEAST_COSINE = 0.95
"""Of the updates of two stages. AdamW's first steps move each weight by the sign of its gradient, also where that is
little more than rounding."""


def rows(num: int, length: int, seed: int) -> list[Experience]:
    """Random sequences of `length` / 2 to `length` tokens, all of them learned from but the first."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(num):
        size = int(rng.integers(length // 2, length + 1))
        mask = np.arange(size) > 0
        made.append(
            Experience(
                id=str(index),
                sequences=(LearnedSequence(token_ids=rng.integers(4, VOCABULARY, size=size), loss_mask=mask),),
            )
        )
    return made


def open_engine(setting: Setting, section: TrainedModelSection, *, small: bool) -> DeepSpeedEngine:
    """An engine that learns by the likelihood of its rows."""
    spec = TrainedModelSpec(
        section=section,
        model=str(setting.model(small=small)),
        head=Head.LOG_PROBS,
        algorithm=SftSection(),
        temperature=1.0,
        num_steps=100,
        seed=0,
    )
    return DeepSpeedEngine(spec, objectives(), device=setting.device)


def objectives() -> dict[str, Objective]:
    """Those of SFT."""
    return {str(role): objective for role, objective in build_algorithm(SftSection()).objectives().items()}


def learn(engine: DeepSpeedEngine, data: Sequence[Experience], limits: MicroBatchLimits) -> float:
    """One optimizer step; returns the norm of its gradient."""
    batches = build_batches(plan_batches(data, limits), data, str(Role.POLICY))
    share = len(batches) // limits.num_ranks
    engine.forward_backward(batches[dist.get_rank() * share : (dist.get_rank() + 1) * share])
    return engine.optim_step().grad_norm


def weights_of(engine: DeepSpeedEngine) -> torch.Tensor:
    """All parameters in one vector of the host."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([parameter.detach().float().cpu().flatten() for parameter in engine.module.parameters()])


@contextmanager
def alone(setting: Setting) -> Iterator[None]:
    """A process group of this process."""
    init_distributed(0, 1, open_store(0, "127.0.0.1", 0, TIMEOUT_S), device=setting.device, timeout_s=TIMEOUT_S)
    try:
        yield
    finally:
        dist.destroy_process_group()


def zero_stages(setting: Setting) -> Figures:
    """Three steps in bfloat16 at each ZeRO stage, on two ranks where there are two GPUs: gradient norms and updates
    agree but for rounding."""
    num_ranks = 2 if setting.is_dry else min(2, setting.num_gpus)
    setting.model(small=True)
    store = open_store(0, "127.0.0.1", 0, TIMEOUT_S)
    run_ranks("zero", setting, num_ranks, store.port)
    start, *ends = (torch.load(setting.folder / f"zero_{name}.pt") for name in ("start", *STAGES))
    norms = json.loads((setting.folder / "zero_norms.json").read_text())
    updates = [end - start for end in ends]
    if not float(updates[0].norm()) > 0:
        raise AssertionError("three steps changed no weight")
    figures = [("ranks", str(num_ranks))]
    for stage, update, norm in zip(STAGES, updates, norms, strict=True):
        cosine = float(torch.nn.functional.cosine_similarity(update, updates[0], dim=0))
        gap = abs(norm / norms[0] - 1)
        if gap > ROUNDING or cosine < LEAST_COSINE:
            raise AssertionError(
                f"stage {stage}: gradient norm {norm:.6g}, {norms[0]:.6g} at stage 0; cosine {cosine:.4f}"
            )
        if stage:
            figures.append((f"stage {stage} beside stage 0", f"gradient norm {gap:.1e} apart, cosine {cosine:.4f}"))
    return figures


def zero_rank(setting: Setting, rank: int, num_ranks: int) -> None:
    """One rank of `zero_stages`, in its process group."""
    limits = MicroBatchLimits(num_ranks=num_ranks, max_tokens_per_micro_batch=256)
    norms = []
    for stage in STAGES:
        section = TrainedModelSection(zero_stage=stage, dtype="bfloat16", lr=1e-3, attention="sdpa")
        engine = open_engine(setting, section, small=True)
        start = weights_of(engine)
        first, *_ = [learn(engine, rows(8, 64, seed), limits) for seed in range(STEPS)]
        norms.append(first)
        end = weights_of(engine)
        if rank == 0:
            torch.save(start, setting.folder / "zero_start.pt")
            torch.save(end, setting.folder / f"zero_{stage}.pt")
            (setting.folder / "zero_norms.json").write_text(json.dumps(norms))
        dist.barrier()


def log_probs(setting: Setting) -> Figures:
    """The engine's packed log-probs beside those of the model's own forward in float32, and what its self-test at load
    found."""
    section = TrainedModelSection(dtype="bfloat16")
    with alone(setting):
        engine = open_engine(setting, section, small=True)
        data = rows(8, 64, 0)
        token_ids = np.concatenate([one.sequences[0].token_ids for one in data])
        packed = PackedTokens(token_ids=token_ids, lengths=_lengths(data))
        (ours,) = engine.forward([packed])
        plain = AutoModelForCausalLM.from_pretrained(setting.model(small=True), dtype=torch.float32)
        torch.nn.Module.to(plain, torch.device(setting.device))
        gaps = []
        for part, own in zip(_split(packed.token_ids, packed), _split(ours, packed), strict=True):
            ids = torch.from_numpy(part)[None].to(setting.device)
            with torch.no_grad():
                logits = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
            expected = logits.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()
            gaps.append(np.abs(own[1:] - expected).max())
        test = engine.self_test
    if max(gaps) > 0.1:
        raise AssertionError(f"log-probs differ by {max(gaps):.3g} nats from those in float32")
    return [
        ("attention, passes", f"{test.attention}, {test.passes}"),
        ("packed beside alone", f"{test.packing_leak:.2e} nats"),
        ("bfloat16 beside float32, largest", f"{max(gaps):.2e} nats"),
    ]


def _lengths(data: Sequence[Experience]) -> np.ndarray:
    return np.array([len(one.sequences[0].token_ids) for one in data])


def _split(array: np.ndarray, packed: PackedTokens) -> list[np.ndarray]:
    return np.split(array, np.cumsum(packed.lengths)[:-1])


def optimizer_swap(setting: Setting) -> Figures:
    """Three steps with optimizer states that are on the device only in the optimizer step: the same weights, and their
    bytes are given back between steps."""

    def train() -> tuple[torch.Tensor, int]:
        before = _allocated()
        engine = open_engine(setting, TrainedModelSection(swap_optimizer=True, dtype="bfloat16", lr=1e-3), small=True)
        for seed in range(STEPS):
            learn(engine, rows(8, 64, seed), MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=256))
        return weights_of(engine), _allocated() - before

    with alone(setting):
        moved, left = train()
        with patch.object(OptimizerSwap, "_to_host", lambda _self: None):
            stayed, held = train()
    if not torch.equal(moved, stayed):
        raise AssertionError("the weights differ from those of an optimizer that stays on the device")
    freed = (held - left) / len(moved)
    if not setting.is_dry and freed < 11:
        raise AssertionError(f"{freed:.1f} bytes a parameter were given back, 12 are expected")
    return [("weights", "the same, bit for bit"), ("given back between steps", f"{freed:.1f} bytes a parameter")]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def memory_and_speed(setting: Setting) -> Figures:
    """Steps of SFT in bfloat16: peak memory beside `rlhf plan`, tokens a second, and MFU."""
    tokens, length, steps = (256, 64, 2) if setting.is_dry else (16384, 2048, 6)
    flags = {
        "policy.model": setting.model(),
        "policy.dtype": "bfloat16",
        "policy.gradient_checkpointing": "false",
        "data.path": "rows.jsonl",
        "data.max_tokens": length,
        "train.max_tokens_per_micro_batch": tokens,
    }
    config = load_config("sft", [word for name, value in flags.items() for word in (f"--{name}", str(value))], {})
    needs = build_algorithm(config.algo).needs
    shapes = shapes_of(config, needs, local_config_json)
    sheet = SHEETS["CPU"] if setting.is_dry else sheet_of(local_gpus()[0])
    sheet = replace(sheet, memory_gib=max(sheet.memory_gib, 24.0))
    (group,) = plan_run(config, needs, shapes, ClusterShape(num_nodes=1, devices_per_node=1, device=sheet)).groups
    section = config.models[Role.POLICY]
    assert isinstance(section, TrainedModelSection)
    limits = MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=tokens)
    with alone(setting):
        engine = open_engine(setting, section, small=False)
        seconds = [
            _timed(partial(learn, engine, rows(4 * tokens // length, length, seed), limits)) for seed in range(steps)
        ]
    data = rows(4 * tokens // length, length, steps - 1)
    lengths = [int(size) for size in _lengths(data)]
    flops_of = training_flops(shapes, config.models, needs.trains, 1)
    rate = sum(size * flops_of(size / 2) for size in lengths) / min(seconds[1:])
    planned = group.peak - (0 if setting.is_dry else group.memory["learn"][Role.POLICY].process)
    measured = peak_memory() if setting.is_dry else peak_device_memory()
    figures = [
        ("peak memory, planned", f"{planned / GIB:.2f} GiB"),
        ("peak memory, measured", f"{measured / GIB:.2f} GiB ({planned / measured:.2f})"),
        ("tokens a second", f"{sum(lengths) / min(seconds[1:]):,.0f}"),
    ]
    return [*figures, *([] if setting.is_dry else [("MFU", f"{rate / (sheet.tflops * TERA):.1%} of {sheet.name}")])]


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
