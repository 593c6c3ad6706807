"""Runs with two rollout engines, one of which is killed while both generate: the other goes on, and a new one joins."""

import re
from collections import Counter
from pathlib import Path

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
FAULT = Fault(number=0, kind="kill", process="rollout engine 1", phase="generate")
"""Struck in step 1: step 0 is saved before."""


def lose_an_engine(command: CommandLine, head: RayHead, name: str, *more: str) -> Run:
    """A run whose engine 1 is killed while both generate."""
    arguments = (*TWO_ENGINES, "--cluster.address", head.address, *more)
    run = command.start(*arguments, name=name, environment=head.environment, faults=[FAULT]).wait()
    (witness,) = read_rows(command.workplace / f"{name}-faults" / WITNESSES)
    assert str(witness["wait"]).startswith("rollout generation "), witness
    return run


def events(folder: Path, kind: str) -> list[str]:
    return [str(row["text"]) for row in read_rows(folder / "events.jsonl") if row["kind"] == kind]


def assert_replaced_alone(run: Run) -> None:
    """Only engine 1 started again."""
    assert run.code == 0, run.output
    assert events(run.folder, "restart") == []
    (text,) = events(run.folder, "replacement")
    assert re.match(r"rollout (generation 1|health check): rollout engine 1 \(node .* died\. ", text), text
    assert text.count("rollout engine 1 (node ") == 2, text
    assert [row["step"] for row in run.metrics] == list(range(1, 6))


def test_of_two_engines_one_is_lost_and_the_run_is_the_same_run(command: CommandLine, head: RayHead) -> None:
    address = ("--cluster.address", head.address)
    straight = command.run(*TWO_ENGINES, *address, name="two_engines", environment=head.environment)
    lost = lose_an_engine(command, head, "lost_engine")
    assert_replaced_alone(lost)
    # A step takes a tenth of a second here: in one of them alone the new engine may have had nothing to do.
    busy = [row["throughput/busy_share_min"] for row in lost.metrics[2:]]
    assert max(busy) > 0, "the new engine got no requests"
    assert lost.figures == straight.figures
    assert lost.weights == straight.weights


def test_an_asynchronous_run_loses_an_engine_and_nothing_else(command: CommandLine, head: RayHead) -> None:
    run = lose_an_engine(command, head, "lost_engine_async", "--rollout.max-lag", "2", "--rollout.order", "ready")
    assert_replaced_alone(run)
    assert all(row["rollout/lag_max"] <= 2 for row in run.metrics)
    learned = Counter(row["prompt_id"] for path in run.folder.glob("rollouts/*.jsonl") for row in read_rows(path))
    assert len(learned) == 20
    assert set(learned.values()) == {2}, "learned from twice"
