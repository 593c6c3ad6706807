"""Runs whose responses have several turns, on real Ray, DeepSpeed and a real engine: what is learned from is what was
sampled, token for token."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.environments.tools import make_tool
from rlhf.types import Json, Message
from tests.integration.agent_model import CALCULATOR, LOOP, SUMS, add, make_caller
from tests.integration.command_line import CommandLine, Run, write_rows
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(900)

SETTINGS = (
    *("--policy.model", "caller", "--data.path", "sums.jsonl", "--rollout.engine", "transformers"),
    *("--rollout.max-prompt-tokens", "272", "--rollout.max-response-tokens", "200", "--rollout.batch-size", "2"),
    *("--policy.warmup-ratio", "0", "--train.num-steps", "2", "--no-log.tensorboard"),
)


@pytest.fixture(scope="module")
def workplace(command: CommandLine) -> CommandLine:
    """The user's folder, with a model that calls tools."""
    make_caller(command.workplace / "caller")
    (command.workplace / "calculator.py").write_text(CALCULATOR)
    rows = [{"prompt": f"{a}+{b}", "answer": f"{a + b}", "limit": 3} for a, b in SUMS]
    write_rows(command.workplace / "sums.jsonl", rows)
    write_rows(
        command.workplace / "held_out.jsonl", [{"prompt": "5+4", "answer": "9"}, {"prompt": "1+3", "answer": "4"}]
    )
    return command


def test_grpo_learns_from_calls_of_a_tool(workplace: CommandLine, head: RayHead) -> None:
    run = workplace.run(
        *("grpo", *SETTINGS, "--rollout.tools", "calculator:add", "--reward.rules", "number"),
        *("--rollout.group-size", "8", "--train.batch-size", "16", "--policy.lr", "1e-4"),
        *("--cluster.address", head.address, "--data.eval-path", "held_out.jsonl", "--eval.every-steps", "1"),
        name="agent-grpo",
        environment=head.environment,
    )
    for row in run.metrics:
        assert row["agent/calls/add"] > 0.1
        assert row["agent/turns"] > 1.1
        assert row["agent/seals"] == row["agent/failed"] == 0.0
        assert row["updates/applied"] == 1.0
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["policy/ratio_max"] == 1.0, "the first ratio is exactly 1, packed"
    tool: Json = json.loads(json.dumps(make_tool(add).schema))
    rows = responses(run)
    assert {row["episode"]["ending"] for row in rows} <= {"answer", "max_tokens", "max_turns"}
    assert sum(row["episode"]["calls"].get("add", 0) for row in rows) > 3
    evaluated = responses(run, "evaluations")
    assert len(evaluated) == 2 * len(run.metrics), "held-out prompts are answered with the tool too"
    for row in [*rows, *evaluated]:
        assert_is_what_the_template_writes(run.model, row, [tool])


def test_ppo_learns_from_an_environment(workplace: CommandLine, head: RayHead) -> None:
    run = workplace.run(
        *("ppo", *SETTINGS, "--rollout.environment", "calculator:Teacher"),
        *("--rollout.group-size", "4", "--train.batch-size", "8", "--policy.lr", "1e-4", "--critic.lr", "1e-3"),
        *(
            "--train.micro-batch-size",
            "1",
            "--algo.num-epochs",
            "1",
            "--colocate",
            "all",
            "--cluster.address",
            head.address,
        ),
        name="agent-ppo",
        environment=head.environment,
    )
    for row in run.metrics:
        assert row["agent/turns"] > 2.0
        assert row["agent/world_tokens"] > 20
        assert row["agent/seals"] == row["agent/failed"] == 0.0
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["policy/ratio_max"] == 1.0, "the first ratio is exactly 1, alone"
        assert np.isfinite(row["critic/loss"])
    for response in responses(run):
        assert response["reward"] == response["parts"]["environment"]
        assert_is_what_the_template_writes(run.model, response, [])


def test_grpo_learns_from_a_users_own_loop(workplace: CommandLine, head: RayHead) -> None:
    """By OpenAI's client. Its prompt has the caller's tools: a segment of its own."""
    (workplace.workplace / "own_loop.py").write_text(LOOP)
    run = workplace.run(
        *("grpo", *SETTINGS, "--rollout.agent", "own_loop.py:run", "--rollout.max-prompt-tokens", "300"),
        *("--rollout.group-size", "8", "--train.batch-size", "16", "--policy.lr", "1e-4"),
        *("--cluster.address", head.address),
        name="agent-loop",
        environment=head.environment,
    )
    for row in run.metrics:
        assert row["agent/calls/add"] > 0.1
        assert row["agent/segments"] == 2.0
        assert row["agent/failed"] == 0.0
        assert row["updates/applied"] == 1.0
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["policy/ratio_max"] == 1.0, "the first ratio is exactly 1, in segments"
    assert {row["episode"]["ending"] for row in responses(run)} <= {"answer", "max_tokens", "max_turns"}


def responses(run: Run, folder: str = "rollouts") -> list[dict[str, Any]]:
    """What the run recorded of all responses."""
    files = sorted((run.folder / folder).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def assert_is_what_the_template_writes(model: Path, row: Mapping[str, Any], tools: list[Json]) -> None:
    """The tokens of a response are those of its conversation, rendered and encoded."""
    tokenizer = load_tokenizer(str(model))
    said = [
        Message(role=message.pop("role"), content=message.pop("content"), fields=message)
        for message in json.loads(json.dumps([*row["columns"]["messages"], *row["episode"]["messages"]]))
    ]
    text = tokenizer.render(said, add_generation_prompt=False, tools=tools)
    assert text.startswith(row["prompt"])
    ids = tokenizer.encode(text)[len(tokenizer.encode(row["prompt"])) :]
    # The template writes a line break after the last turn, and its end, which a response that was cut has not.
    assert row["num_tokens"] in (len(ids) - 1, len(ids) - 2)
    assert tokenizer.decode(ids[: row["num_tokens"]]) == row["response"]
