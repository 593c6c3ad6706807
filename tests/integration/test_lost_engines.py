"""Runs with two rollout engines that lose processes: one engine while both generate, the reward function while it
scores, an engine in a weight sync. What can be replaced is replaced alone, and the run stays the same run."""

import re
from collections import Counter
from collections.abc import Sequence

import pytest

from rlhf.cli.chaos_child import WITNESSES, Fault
from rlhf.orchestrator.run.files import read_rows
from tests.integration.command_line import CommandLine, Run
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(600)

TWO_ENGINES = (
    *("grpo", "--policy.model", "policy", "--policy.lr", "1e-3"),
    *("--reward.sources", "[{type: function, function: taste:vowels, timeout_s: 300}]"),
    *("--data.path", "prompts.jsonl", "--data.template", "plain", "--checkpoint.every-steps", "1"),
    *("--rollout.engine", "transformers", "--rollout.num-engines", "2", "--rollout.batch-size", "4"),
    *("--rollout.group-size", "2", "--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8"),
    *("--train.batch-size", "8", "--train.num-steps", "5", "--log.sample-every-steps", "0"),
)
FAULTS = (
    Fault(number=0, kind="kill", process="rollout engine 1", phase="generate"),
    Fault(number=1, kind="kill", process="reward function", phase="score"),
    Fault(number=2, kind="kill", process="rollout engine 0", phase="sync"),
)
"""The first in step 1: step 0 is saved before. Each waits for a saved step after the one before."""


def run_with(command: CommandLine, head: RayHead, name: str, faults: Sequence[Fault], *more: str) -> Run:
    """A run in which all these faults happen."""
    arguments = (*TWO_ENGINES, "--cluster.address", head.address, *more)
    run = command.run_with_faults(*arguments, name=name, environment=head.environment, faults=faults)
    assert run.code == 0, run.output
    witnesses = read_rows(command.workplace / f"{name}-faults" / WITNESSES)
    waits = {str(row["phase"]): str(row["wait"]) for row in witnesses}
    assert list(waits) == [fault.phase for fault in faults], waits
    assert waits["generate"].startswith("rollout generation "), waits
    assert [row["step"] for row in run.metrics] == list(range(1, 6))
    return run


def events(run: Run, kind: str) -> list[str]:
    return [str(row["text"]) for row in read_rows(run.folder / "events.jsonl") if row["kind"] == kind]


def assert_all_repaired(run: Run) -> None:
    """Engine 1 and the reward function were replaced alone; the engine lost in a sync took everything with it."""
    engine, reward = events(run, "replacement")
    assert_replaced(engine)
    assert "reward function" in reward, reward
    (restart,) = events(run, "restart")
    assert "rollout engine 0" in restart, restart


def assert_replaced(engine: str) -> None:
    """Only engine 1 started again."""
    assert re.match(r"rollout (generation 1|health check): rollout engine 1 \(node .* died\. ", engine), engine
    assert engine.count("rollout engine 1 (node ") == 2, engine


def test_a_run_that_loses_processes_is_the_same_run(command: CommandLine, head: RayHead) -> None:
    address = ("--cluster.address", head.address)
    straight = command.run(*TWO_ENGINES, *address, name="two_engines", environment=head.environment)
    lost = run_with(command, head, "lost_engine", FAULTS[:1])
    assert events(lost, "restart") == []
    (text,) = events(lost, "replacement")
    assert_replaced(text)
    # A step takes a tenth of a second here: in one of them alone the new engine may have had nothing to do.
    busy = [row["throughput/busy_share_min"] for row in lost.metrics[2:]]
    assert max(busy) > 0, "the new engine got no requests"
    assert lost.figures == straight.figures
    assert lost.weights == straight.weights
    all_lost = run_with(command, head, "all_lost", FAULTS)
    assert_all_repaired(all_lost)
    assert all_lost.figures == straight.figures
    assert all_lost.weights == straight.weights


def test_an_asynchronous_run_loses_processes_and_nothing_else(command: CommandLine, head: RayHead) -> None:
    run = run_with(command, head, "all_lost_async", FAULTS, "--rollout.max-lag", "2", "--rollout.order", "ready")
    assert_all_repaired(run)
    assert all(row["rollout/lag_max"] <= 2 for row in run.metrics)
    learned = Counter(row["prompt_id"] for path in run.folder.glob("rollouts/*.jsonl") for row in read_rows(path))
    assert len(learned) == 20
    assert set(learned.values()) == {2}, "learned from twice"
