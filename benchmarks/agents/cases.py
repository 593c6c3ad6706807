"""The runs: a task, a method, and how the policy's turns are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """One run: GRPO with one optimizer step for the 128 responses of a step, where it says nothing else."""

    about: str
    task: Task = PRODUCTS
    method: str = "grpo"
    way: str
    """One of WAYS."""
    lr: float = 3e-4
    num_steps: int = 30
    prompts: int = 16
    """In a step."""
    group_size: int = 8
    further: Mapping[str, object] = field(default_factory=lambda: {"train.batch_size": 128})
    """Settings of the method."""


CASES: Mapping[str, Case] = {
    "grpo": Case(
        about="GRPO, the calculator in rollout.tools",
        way="tools",
    ),
    "ppo": Case(
        about="PPO with a critic, rollout.tools",
        method="ppo",
        way="tools",
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
        method="online-dpo",
        way="tools",
        further={"train.batch_size": 16},
    ),
    "openai": Case(
        about="GRPO, a loop with the openai client",
        way="openai",
    ),
    "anthropic": Case(
        about="GRPO, a loop with the anthropic client",
        way="anthropic",
    ),
    "game": Case(
        about="GRPO, guess a number in rollout.environment",
        task=GAME,
        way="environment",
    ),
}
