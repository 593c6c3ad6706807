"""Runs with tools and environments in the ways that runs are spread, delayed, ended and continued: real Ray, DeepSpeed
and vLLM."""

import re
import signal

import pytest

from tests.integration.agent_model import CALCULATOR, SUMS, make_caller
from tests.integration.command_line import CommandLine, Run, write_rows
from tests.integration.ray_head import RayHead, joined_nodes

pytestmark = pytest.mark.timeout(900)

SETTINGS = (
    *("grpo", "--policy.model", "caller", "--data.path", "sums.jsonl", "--rollout.max-prompt-tokens", "272"),
    *("--rollout.max-response-tokens", "200", "--rollout.batch-size", "2", "--rollout.group-size", "4"),
    *("--rollout.kv-cache-gib", "0.1", "--policy.lr", "1e-4", "--policy.warmup-ratio", "0"),
    *("--train.batch-size", "8", "--no-log.tensorboard", "--no-log.report"),
)
RESETS_A_STEP = 8
SHARDED = (
    *("--rollout.environment", "calculator:Desk", "--reward.rules", "number"),
    *("--policy.num-gpus-per-node", "2", "--policy.zero-stage", "3"),
    *("--rollout.engine", "vllm", "--rollout.enforce-eager"),
    *("--train.num-steps", "4", "--checkpoint.every-steps", "2", "--train.micro-batch-size", "1"),
)


@pytest.fixture(scope="module")
def workplace(command: CommandLine) -> CommandLine:
    """The user's folder, with a model that calls tools."""
    make_caller(command.workplace / "caller")
    (command.workplace / "calculator.py").write_text(CALCULATOR)
    rows = [{"prompt": f"{a}+{b}", "answer": f"{a + b}", "limit": 3} for a, b in SUMS]
    write_rows(command.workplace / "sums.jsonl", rows)
    return command


@pytest.fixture(scope="module")
def straight(workplace: CommandLine, head: RayHead) -> Run:
    """Two ranks with ZeRO-3, sequence by sequence."""
    arguments = (*SETTINGS, *SHARDED, "--cluster.address", head.address)
    return workplace.run(*arguments, name="agent-straight", environment=head.environment)


def test_ranks_with_zero_3_learn_from_calls_that_vllm_samples(straight: Run) -> None:
    assert [row["step"] for row in straight.metrics] == [1, 2, 3, 4]
    for row in straight.metrics:
        assert row["policy/ratio_max"] == 1.0
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["agent/seals"] == row["agent/failed"] == 0.0
        assert row["agent/calls/add"] > 0.1
        assert row["policy/grad_norm"] > 0.0


def test_a_killed_run_is_continued_as_if_nothing_had_happened(
    workplace: CommandLine, head: RayHead, straight: Run
) -> None:
    arguments = (*SETTINGS, *SHARDED, "--cluster.address", head.address)
    in_step_4 = 3 * RESETS_A_STEP + 3
    driver = workplace.start(*arguments, name="agent-killed", hold_at=in_step_4, environment=head.environment)
    driver.wait_until_held()
    driver.process.send_signal(signal.SIGKILL)
    driver.wait()
    driver.release()
    assert len(driver.wait().metrics) in (2, 3), "of step 3 they may not be written yet"
    run = workplace.run(*arguments, "--resume", name="agent-killed", environment=head.environment)
    assert "continuing after step 2" in run.output
    assert run.figures == straight.figures
    assert run.weights == straight.weights


def test_a_lagging_run_plays_a_game_on_two_nodes(workplace: CommandLine, head: RayHead) -> None:
    with joined_nodes(head, ["127.0.0.2"], num_cpus=1):
        run = workplace.run(
            *(*SETTINGS, "--rollout.environment", "calculator:Teacher", "--rollout.environment-workers", "2"),
            *("--rollout.engine", "transformers", "--rollout.max-lag", "1", "--train.num-steps", "3"),
            *("--cluster.address", head.address),
            name="agent-lag",
            environment=head.environment,
        )
    nodes = set(re.findall(r"environment worker \d \(node ([\d.]+)", run.output))
    assert "127.0.0.2" in nodes
    assert len(nodes) == 2
    assert max(row["rollout/lag_max"] for row in run.metrics) == 1
    for row in run.metrics:
        assert row["agent/turns"] > 2.0
        assert row["agent/seals"] == row["agent/failed"] == 0.0
    assert run.metrics[0]["mismatch/log_prob_max"] <= 1e-4
