"""Router replay on real Ray, DeepSpeed and vLLM: what vLLM records is what transformers' routers choose, and runs whose
trainer uses it. What a pass with given experts computes is in tests/unit/engines/models/test_router_replay.py."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import generate
from rlhf.engines.models.routers import routers_of
from rlhf.engines.rollout.open_engine import ServingEngine, open_engine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.types import Rollout, RolloutRequest, Sampling
from tests.family_models import write_family
from tests.integration.agent_model import CALCULATOR
from tests.integration.command_line import CommandLine, Run, write_rows
from tests.integration.ray_head import RayHead
from tests.integration.rollout_support import IGNORE_VLLM_IMPORT_WARNINGS

pytestmark = [
    *IGNORE_VLLM_IMPORT_WARNINGS,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("RLHF_TEST_ROUTER_REPLAY") != "all",
        reason="minutes of runs: RLHF_TEST_ROUTER_REPLAY=all, every night",
    ),
]

UNKNOWN = 255
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
COMMON = (
    *("grpo", "--policy.model", "qwen3_moe", "--policy.warmup-ratio", "0", "--rollout.engine", "vllm"),
    *("--rollout.enforce-eager", "--rollout.kv-cache-gib", "0.1", "--rollout.batch-size", "4"),
    *("--rollout.group-size", "4", "--train.batch-size", "16", "--policy.gradient-checkpointing"),
    *("--no-log.tensorboard", "--rollout.router-replay"),
)
GRPO = (
    *COMMON,
    *("--data.path", "prompts.jsonl", "--data.template", "plain", "--reward.function", "taste:vowels"),
    *("--rollout.max-prompt-tokens", "16"),
)
EPISODES = (
    *COMMON,
    *("--data.path", "games.jsonl", "--rollout.environment", "calculator:Teacher", "--policy.lr", "1e-3"),
    *("--rollout.max-prompt-tokens", "64", "--rollout.max-response-tokens", "240", "--rollout.max-turn-tokens", "80"),
    *("--train.num-steps", "2"),
)
SHORT = (
    *("--policy.lr", "1e-3", "--rollout.max-response-tokens", "8", "--train.num-steps", "3"),
    *("--checkpoint.every-steps", "1", "--checkpoint.keep", "3"),
)
OVERLAPPING = (
    *("--policy.lr", "1e-2", "--rollout.max-response-tokens", "48", "--train.num-steps", "6"),
    *("--rollout.max-lag", "1", "--rollout.order", "ready"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / request.param, request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[ServingEngine]:
    section = RolloutSection(
        engine="vllm",
        max_prompt_tokens=160,
        max_response_tokens=32,
        kv_cache_gib=0.05,
        enforce_eager=True,
        router_replay=True,
    )
    engine = open_engine(EngineSpec(section=section, model=str(folder), dtype="float32", device="cpu"), name="replay")
    yield engine
    engine.close()


def requests(seed: int) -> list[RolloutRequest]:
    """Of several lengths; the first eight share a prompt of more than one block of the KV cache."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(5, 100, 150)
    return [
        RolloutRequest(
            id=f"{seed}/{index}",
            prompt_id=str(index),
            prompt_token_ids=(shared if index < 8 else rng.integers(5, 100, 20 + index)).astype(np.int64),
            seed=index,
            sampling=Sampling(max_tokens=4 + index),
        )
        for index in range(12)
    ]


def chosen(model: torch.nn.Module, token_ids: np.ndarray) -> np.ndarray:
    """[tokens, routers, top_k]: what transformers' routers choose, in the order of their numbers."""
    said: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_hook(lambda module, inputs, outputs: said.append(outputs[-1]))
        for router in routers_of(model)  # type: ignore[arg-type]
    ]
    with torch.no_grad():
        model(torch.tensor(token_ids)[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(said, 1).sort(-1).values.numpy()


def assert_recorded(model: torch.nn.Module, request: RolloutRequest, rollout: Rollout) -> None:
    token_ids = np.concatenate([request.prompt_token_ids, rollout.token_ids])
    experts = rollout.routed_experts
    assert experts is not None
    assert len(experts) == len(token_ids)
    assert (experts[-1] == UNKNOWN).all()
    assert np.array_equal(np.sort(experts[:-1], -1), chosen(model, token_ids)[:-1])


def test_vllm_records_what_its_routers_choose(folder: Path, engine: ServingEngine) -> None:
    """In float32 no two scores are close enough for rounding to decide. Prompts that share a prefix, within a step and
    after it, and the same ones again, which are found whole in the prefix cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    asked = requests(0)
    for request, rollout in zip(asked, generate(engine, asked), strict=True):
        assert_recorded(model, request, rollout)
    for request, rollout in zip(asked, generate(engine, asked), strict=True):
        assert_recorded(model, request, rollout)


def started(command: CommandLine, head: RayHead, arguments: Sequence[str], name: str) -> Run:
    write_family(command.workplace / "qwen3_moe", "qwen3_moe")
    return command.run(*arguments, "--cluster.address", head.address, name=name, environment=head.environment)


@pytest.fixture(scope="module")
def grpo(command: CommandLine, head: RayHead) -> Run:
    return started(command, head, [*GRPO, *SHORT], "replayed")


def test_all_tokens_are_replayed(grpo: Run) -> None:
    assert len(grpo.metrics) == 3
    for row in grpo.metrics:
        assert row["router/replayed"] == 1.0
        assert row["router/replay_changed"] == 0.0, "float32 on both sides"
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["updates/applied"] == 1.0
        assert row["policy/ratio_max"] == 1.0


def test_a_run_goes_on_as_if_it_had_not_stopped(command: CommandLine, head: RayHead, grpo: Run) -> None:
    weights, figures = grpo.weights, grpo.figures
    for step in (2, 3):
        shutil.rmtree(grpo.folder / "checkpoints" / f"step_{step}")
    shutil.rmtree(grpo.model)
    resumed = started(command, head, [*GRPO, *SHORT, "--resume"], "replayed")
    assert resumed.weights == weights
    assert resumed.figures == figures


def test_responses_that_go_on_over_weight_syncs(command: CommandLine, head: RayHead) -> None:
    """With gradient steps large enough that routers choose otherwise; each token has the experts that sampled it."""
    run = started(command, head, [*GRPO, *OVERLAPPING], "overlapping")
    assert all(row["router/replayed"] == 1.0 for row in run.metrics)
    assert max(row["router/replay_changed"] for row in run.metrics) > 0.0


def test_responses_of_several_turns(command: CommandLine, head: RayHead) -> None:
    """Later turns are asked for with all that was said; earlier tokens keep the experts that sampled them."""
    (command.workplace / "calculator.py").write_text(CALCULATOR)
    write_rows(command.workplace / "games.jsonl", [{"prompt": f"play {n}", "limit": 3} for n in range(12)])
    run = started(command, head, EPISODES, "turns")
    for row in run.metrics:
        assert row["agent/turns"] > 1.1
        assert row["router/replayed"] == 1.0
        assert row["router/replay_changed"] == 0.0
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["policy/ratio_max"] == 1.0
