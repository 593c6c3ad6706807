"""Everything on one GPU: bfloat16, weights by CUDA IPC, engines that sleep while models learn."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.config.algo import SftSection
from rlhf.config.models import TrainedModelSection
from rlhf.config.rollout import RolloutSection
from rlhf.engines.models.checkpointing import checkpoint_layers
from rlhf.engines.models.four_bit import FourBitLinear
from rlhf.engines.models.fresh_model import make_llama
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.rollout.open_engine import open_engine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.optimizer_swap import OptimizerSwap
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Head
from tests.families import tiny_family
from tests.integration.command_line import CommandLine, clean_environment, write_workplace
from tests.integration.training_losses import OBJECTIVES
from tests.integration.training_rows import experiences
from tests.rounding import rounded

pytestmark = pytest.mark.timeout(1200)

SHARED = ("--colocate", "all", "--rollout.engine", "vllm", "--rollout.gpu-memory-utilization", "0.3")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder = tmp_path_factory.mktemp("gpu")
    write_workplace(folder)
    command = CommandLine(folder)
    yield command
    command.close()


def test_ppo_with_all_roles_on_one_gpu(command: CommandLine) -> None:
    run = command.run("ppo", "ppo.yaml", *SHARED, name="shared", environment=clean_environment())
    assert run.code == 0, run.output
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6]
    for row in run.metrics:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert row["mismatch/log_prob"] < 0.1
    assert run.metrics[-1]["memory/rollout"] > 0


def test_a_sleeping_engine_gives_its_memory_back(tmp_path: Path) -> None:
    write_workplace(tmp_path)
    section = RolloutSection(engine="vllm", gpu_memory_utilization=0.3, max_prompt_tokens=16, max_response_tokens=8)
    spec = EngineSpec(
        section=section, model=str(tmp_path / "policy"), dtype="bfloat16", device="cuda", sync_backend="ipc"
    )
    engine = open_engine(spec, name="engine")
    total = torch.cuda.mem_get_info()[1]
    awake = torch.cuda.mem_get_info()[0]
    engine.sleep()
    asleep = torch.cuda.mem_get_info()[0]
    engine.wake()
    again = torch.cuda.mem_get_info()[0]
    engine.close()
    assert asleep - awake > 0.2 * total
    assert abs(again - awake) < 0.05 * total


def test_a_swapped_optimizer_learns_the_same_and_leaves_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same engine whose optimizer stays on the GPU."""
    size = make_llama(tmp_path / "model", vocab_size=512, hidden_size=1024, num_layers=8)
    init_distributed(0, 1, open_store(0, "127.0.0.1", 0, 60.0), device="cuda", timeout_s=60.0)
    section = TrainedModelSection(swap_optimizer=True, lr=1e-3)

    def train() -> tuple[torch.Tensor, int]:
        """Weights after three steps, and the bytes that the engine holds then."""
        before = torch.cuda.memory_allocated()
        spec = TrainedModelSpec(
            section=section,
            model=str(tmp_path / "model"),
            head=Head.LOG_PROBS,
            algorithm=SftSection(),
            temperature=1.0,
            num_steps=3,
            seed=0,
        )
        engine = DeepSpeedEngine(spec, OBJECTIVES, device="cuda")
        for seed in range(3):
            data = experiences(seed=seed)
            plan = plan_batches(data, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1000))
            engine.forward_backward(build_batches(plan, data, "policy"))
            engine.optim_step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            weights = torch.cat([parameter.detach().cpu().flatten() for parameter in engine.module.parameters()])
        return weights, torch.cuda.memory_allocated() - before

    moves, left = train()
    monkeypatch.setattr(OptimizerSwap, "_to_host", lambda _self: None)
    stays, held = train()
    assert torch.equal(moves, stays)
    assert held - left > 11 * size


def test_inputs_of_layers_leave_the_gpu_until_the_backward_pass() -> None:
    tokens = torch.arange(8192, device="cuda")[None] % 100
    gradients, held = [], []
    for how in (True, "offload"):
        model = tiny_family("llama", {"num_hidden_layers": 4, "max_position_embeddings": 8192}, attention="sdpa")
        model.to(torch.device("cuda")).train()  # type: ignore[arg-type]
        section = TrainedModelSection.model_validate({"gradient_checkpointing": how})
        checkpoint_layers(model, section, "policy.model", on_gpu=True)
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=tokens, use_cache=False).logits.logsumexp(-1).sum()
        held.append(torch.cuda.memory_allocated() - before)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(kept, away) for kept, away in zip(*gradients, strict=True))
    assert held[0] - held[1] >= 3 * 8192 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_those_of_the_definition(dtype: torch.dtype) -> None:
    plain = torch.nn.Linear(96, 64, dtype=dtype).requires_grad_(False)
    weight = plain.weight.clone()
    layer = FourBitLinear(plain)
    layer.quantize(torch.device("cuda"))
    layer.bias = torch.nn.Parameter(layer.bias.cuda(), requires_grad=False)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(layer.dequantized().cpu(), rounded(weight), rtol=tolerance, atol=0.0)
    inputs = torch.randn(5, 96, dtype=dtype, device="cuda", requires_grad=True)
    outputs = layer(inputs)
    assert torch.equal(outputs, torch.nn.functional.linear(inputs, layer.dequantized(), layer.bias))
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
    torch.testing.assert_close(gradient, layer.dequantized().sum(0).expand(5, 96), rtol=1e-2, atol=1e-2)
