"""One short run of each kind of method through the command line, on real Ray and DeepSpeed: it learns, and what it
says it did, it did.

Runs join one cluster and sample with the transformers engine, which starts fastest, but for the one whose adapters are
sent alone, and the one whose policy and engine are in parts; what the methods compute is pinned by their unit tests,
and other runs with vLLM by those of PPO. Some have a process for each role and some share one: PPO's runs show that
this changes nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.command_line import CommandLine, abandoned, write_rows
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
ONLINE = (
    *("--policy.model", "policy", "--policy.lr", "1e-2", "--policy.warmup-ratio", "0", "--data.path", "prompts.jsonl"),
    *("--data.template", "plain", "--reward.function", "taste:vowels", "--rollout.engine", "transformers"),
    *("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8", "--rollout.batch-size", "4"),
    *("--rollout.group-size", "4", "--train.num-steps", "3", "--no-log.tensorboard"),
)
BY_VLLM = (*("vllm" if word == "transformers" else word for word in ONLINE), "--rollout.enforce-eager")
TOGETHER = ("--colocate", "all")
MODELS_TOGETHER = ("--colocate", "policy,reference,reward")
SPREAD = ("--policy.num-gpus-per-node", "2", "--rollout.tensor-parallel-size", "2")
"""The policy is sharded over two ranks, the engine over two processes."""
ADAPTERS = ("--policy.lora.rank", "4")
IN_FOUR_BITS = ("--policy.quantization", "nf4")
GIVEN = (
    *("--data.template", "plain", "--data.max-tokens", "64", "--data.eval-fraction", "0.2"),
    *("--train.batch-size", "8", "--train.num-steps", "6", "--no-log.tensorboard"),
)
OFFLINE = ("--policy.model", "policy", "--policy.lr", "1e-2", "--policy.warmup-ratio", "0", *GIVEN)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, the actors that it must have started, and figures that must be there."""

    arguments: tuple[str, ...]
    roles: frozenset[str]
    figures: Sequence[str] = ()
    at_least: Mapping[str, float] = field(default_factory=dict)
    """Least values of the last step's figures."""
    at_most: Mapping[str, float] = field(default_factory=dict)
    """Greatest ones, of every step."""
    at_first: Mapping[str, float] = field(default_factory=dict)
    """Greatest ones, of the first step."""


CASES = {
    "dapo": Case(
        arguments=("grpo", "--algo", "dapo", "--train.batch-size", "16", *BY_VLLM, *SPREAD),
        roles=frozenset({"policy", "rollout", "reward"}),
        figures=("groups/zero_std", "importance/weight", "rollout/groups_dropped"),
        at_most={"mismatch/log_prob_max": 1e-4},
    ),
    "remax": Case(
        arguments=(
            "grpo",
            "--algo",
            "remax",
            "--train.batch-size",
            "16",
            *ONLINE,
            *MODELS_TOGETHER,
            *ADAPTERS,
            *IN_FOUR_BITS,
        ),
        roles=frozenset({"policy", "reference", "rollout", "reward"}),
        figures=("rollout/baseline", "kl/ref_per_token"),
        at_most={"mismatch/log_prob_max": 1e-4},
        at_first={"kl/ref_per_token": 1e-6},  # the reference is rounded as the policy is
    ),
    "rloo": Case(
        arguments=(
            "grpo",
            "--algo",
            "rloo",
            "--train.batch-size",
            "16",
            *BY_VLLM,
            *MODELS_TOGETHER,
            *ADAPTERS,
            "--rollout.sync-adapters",
        ),
        roles=frozenset({"policy", "reference", "rollout", "reward"}),
        figures=("sync/bytes", "kl/ref_per_token"),
        at_most={"mismatch/log_prob_max": 1e-4},
    ),
    "online-dpo-ema": Case(
        arguments=("online-dpo", "--algo.reference", "ema", "--train.batch-size", "4", *ONLINE),
        roles=frozenset({"policy", "rollout", "reward"}),
        figures=("pairs/accuracy", "pairs/tied", "mismatch/log_prob"),
    ),
    "online-kto": Case(
        arguments=("kto", "--online", "--train.batch-size", "16", *ONLINE, *TOGETHER),
        roles=frozenset({"policy", "reference", "rollout", "reward"}),
        figures=("kto/z0", "labels/desirable", "mismatch/log_prob"),
    ),
    "dpo": Case(
        arguments=("dpo", "--data.path", "preferences.jsonl", *OFFLINE),
        roles=frozenset({"policy", "reference"}),
        figures=("pairs/margin",),
        at_least={"eval/accuracy": 1.0, "pairs/accuracy": 1.0},
    ),
    "simpo": Case(
        arguments=("dpo", "--loss", "simpo", "--data.path", "preferences.jsonl", *OFFLINE),
        roles=frozenset({"policy"}),
        at_least={"eval/accuracy": 1.0, "pairs/accuracy": 1.0},
    ),
    "kto": Case(
        arguments=(
            *("kto", "--data.path", "preferences.jsonl", "--reference.cache-dir", "apart_from_dpo"),
            *OFFLINE,
            *TOGETHER,
        ),
        roles=frozenset({"policy", "reference"}),
        figures=("kto/z0",),
        at_least={"eval/auc": 0.99},
    ),
    "prm": Case(
        arguments=(
            "prm",
            "--reward.model",
            "policy",
            "--reward.lr",
            "1e-2",
            "--data.path",
            "steps.jsonl",
            *OFFLINE[6:],
        ),
        roles=frozenset({"reward"}),
        at_least={"eval/accuracy": 0.9},
    ),
    "custom": Case(
        arguments=(
            *("grpo", "--algo", "custom", "--algo.algorithm", "best_of_group:BestOfGroup"),
            *("--train.batch-size", "4", *ONLINE),
        ),
        roles=frozenset({"policy", "rollout", "reward"}),
        figures=("reward/best",),
    ),
}


@pytest.fixture(scope="module")
def workplace(command: CommandLine) -> CommandLine:
    """The user's folder, with the algorithm of the documentation and labeled steps in it."""
    page = (ROOT / "docs" / "adding_an_algorithm.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    (command.workplace / "best_of_group.py").write_text(shown[1])
    steps = [("a" * 5, True), ("z" * 5, False)]
    rows = [
        {"prompt": f"say {i}", "completions": [text for text, _ in order], "labels": [label for _, label in order]}
        for i in range(30)
        for order in (steps, steps[::-1])
    ]
    write_rows(command.workplace / "steps.jsonl", rows)
    return command


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_each_method_learns(name: str, workplace: CommandLine, head: RayHead) -> None:
    case = CASES[name]
    before_run = abandoned()
    run = workplace.run(*case.arguments, "--cluster.address", head.address, name=name, environment=head.environment)
    steps = 6 if "6" in case.arguments else 3
    assert [row["step"] for row in run.metrics] == list(range(1, steps + 1))
    for row in run.metrics:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert row["updates/applied"] == 1.0
    last = run.metrics[-1]
    assert set(case.figures) <= last.keys()
    for figure, most in case.at_most.items():
        assert max(row[figure] for row in run.metrics) <= most, (figure, run.metrics)
    for figure, most in case.at_first.items():
        assert abs(run.metrics[0][figure]) <= most, (figure, run.metrics[0])
    for figure, least in case.at_least.items():
        assert last[figure] >= least, (figure, last[figure])
    processes = re.findall(r"^  ([\w+]+?)[ \[/0-9(]", run.output, re.MULTILINE)
    started = {role.lower() for names in processes for role in names.split("+")}
    assert {role for role in ("policy", "reference", "critic", "reward", "rollout") if role in started} == case.roles
    before = load_file(workplace.workplace / "policy" / "model.safetensors")
    after = load_file(run.model / "model.safetensors")
    assert any(not torch.equal(weight, after[key]) for key, weight in before.items() if key in after)
    assert abandoned() <= before_run, "a process has left these"
