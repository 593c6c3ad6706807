"""Whole runs that cannot learn: their first lines name the cause, on the screen and in events.jsonl.

One cause is what an engine does, one what an optimizer does; unit tests have the others.
"""

import pytest

from rlhf.orchestrator.run.files import read_rows
from tests.integration.command_line import CommandLine
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(600)

RUN = (
    *("grpo", "--policy.model", "policy", "--data.path", "prompts.jsonl", "--data.template", "plain"),
    *("--rollout.engine", "transformers", "--rollout.batch-size", "4", "--rollout.group-size", "4"),
    *("--rollout.max-prompt-tokens", "16", "--train.batch-size", "16", "--train.num-steps", "1"),
)
VOWELS = ("--reward.function", "taste.py:vowels")
CASES = {
    "cut": (
        (*VOWELS, "--rollout.max-response-tokens", "2"),
        "after step 1: all responses were cut at 2 tokens (rollout.max_response_tokens), none ended by itself",
    ),
    "slow": (
        (*VOWELS, "--rollout.max-response-tokens", "24", "--policy.lr", "1e-12", "--policy.lr-schedule", "constant"),
        "after step 1: the learning rate of the policy is 5e-13 because policy.lr is 1e-12: too small to change",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_names_why_nothing_is_learned(name: str, command: CommandLine, head: RayHead) -> None:
    settings, cause = CASES[name]
    run = command.run(*RUN, *settings, "--cluster.address", head.address, name=name, environment=head.environment)
    (first, *others) = [
        str(row["text"]) for row in read_rows(run.folder / "events.jsonl") if row["kind"] == "diagnosis"
    ]
    assert first.startswith(cause)
    assert not others, "what follows from the cause is not told"
    assert f"diagnosis: {cause}" in run.output
