"""The runs: a task, a method, and how the policy's turns are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.agents.game import GAME, MAX_TURNS
from benchmarks.agents.products import PRODUCTS
from benchmarks.agents.task import Task

USER_CODE = "benchmarks.agents.user_code"
WAYS: Mapping[str, Mapping[str, object]] = {
    "tools": {"rollout.tools": f"{USER_CODE}.calculator:multiply", "reward.rules": "number"},
    "openai": {"rollout.agent": f"{USER_CODE}.openai_loop:run"},
    "anthropic": {"rollout.agent": f"{USER_CODE}.anthropic_loop:run"},
    "environment": {"rollout.environment": f"{USER_CODE}.game:Guess", "rollout.max_turns": MAX_TURNS},
}
"""Settings of how responses come about, before training and in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    about: str
    task: Task
    method: str
    way: str
    """One of WAYS."""
    lr: float
    num_steps: int
    prompts: int
    """In a step."""
    group_size: int = 8
    further: Mapping[str, object]
    """Settings of the method."""


WHOLE_BATCH: Mapping[str, object] = {"train.batch_size": 128}

CASES: Mapping[str, Case] = {
    "grpo": Case(
        about="GRPO, the calculator in rollout.tools",
        task=PRODUCTS,
        method="grpo",
        way="tools",
        lr=3e-4,
        num_steps=30,
        prompts=16,
        further=WHOLE_BATCH,
    ),
    "ppo": Case(
        about="PPO with a critic, rollout.tools",
        task=PRODUCTS,
        method="ppo",
        way="tools",
        lr=3e-4,
        num_steps=30,
        prompts=128,
        group_size=1,
        further={
            "critic.lr": 1e-3,
            "algo.kl.coef": 0,
            "algo.gae_lambda": 1,
            "algo.num_epochs": 2,
            "train.batch_size": 64,
        },
    ),
    "online-dpo": Case(
        about="online DPO, rollout.tools",
        task=PRODUCTS,
        method="online-dpo",
        way="tools",
        lr=3e-4,
        num_steps=30,
        prompts=16,
        further={"train.batch_size": 16},
    ),
    "openai": Case(
        about="GRPO, a loop with the openai client",
        task=PRODUCTS,
        method="grpo",
        way="openai",
        lr=3e-4,
        num_steps=30,
        prompts=16,
        further=WHOLE_BATCH,
    ),
    "anthropic": Case(
        about="GRPO, a loop with the anthropic client",
        task=PRODUCTS,
        method="grpo",
        way="anthropic",
        lr=3e-4,
        num_steps=30,
        prompts=16,
        further=WHOLE_BATCH,
    ),
    "game": Case(
        about="GRPO, guess a number in rollout.environment",
        task=GAME,
        method="grpo",
        way="environment",
        lr=3e-4,
        num_steps=50,
        prompts=16,
        further=WHOLE_BATCH,
    ),
}
