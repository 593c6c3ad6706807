"""Whole runs that cannot learn: their first lines name the cause, on the screen and in events.jsonl."""

import pytest

from rlhf.orchestrator.run.files import read_rows
from tests.integration.command_line import CommandLine, write_rows
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(600)

RUN = (
    *("grpo", "--policy.model", "policy", "--data.path", "labeled.jsonl", "--data.template", "plain"),
    *("--rollout.engine", "transformers", "--rollout.batch-size", "4", "--rollout.group-size", "4"),
    *("--rollout.max-prompt-tokens", "16", "--train.batch-size", "16", "--train.num-steps", "1"),
)
VOWELS = ("--reward.function", "taste.py:vowels")
ENDING = ("--rollout.max-response-tokens", "24")
"""Room in which some responses end by themselves."""
CASES = {
    "cut": (
        (*VOWELS, "--rollout.max-response-tokens", "2"),
        "after step 1: all responses were cut at 2 tokens (rollout.max_response_tokens), none ended by itself",
    ),
    "equal": (
        (*ENDING, "--reward.function", "even.py:half"),
        "after step 1: every response of a step has the same reward (0.5), so that all advantages are 0 and nothing is "
        "learned. Either the task is solved, or the reward does not look at the response.",
    ),
    "never": (
        (*ENDING, "--reward.rules", "exact-match"),
        "after step 1: the reward `exact-match` is 0 for every response, so that all advantages are 0 and nothing is "
        "learned. Either no response is right (take easier prompts or a better model), or the reward does not find",
    ),
    "slow": (
        (*ENDING, *VOWELS, "--policy.lr", "1e-12", "--policy.lr-schedule", "constant"),
        "after step 1: the learning rate of the policy is 5e-13 because policy.lr is 1e-12: too small to change",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_names_why_nothing_is_learned(name: str, command: CommandLine, head: RayHead) -> None:
    rows = [{"prompt": f"say red {number}", "label": "the moon"} for number in range(8)]
    write_rows(command.workplace / "labeled.jsonl", rows)
    (command.workplace / "even.py").write_text("def half(responses):\n    return [0.5] * len(responses)\n")
    settings, cause = CASES[name]
    run = command.run(*RUN, *settings, "--cluster.address", head.address, name=name, environment=head.environment)
    (first, *others) = [
        str(row["text"]) for row in read_rows(run.folder / "events.jsonl") if row["kind"] == "diagnosis"
    ]
    assert first.startswith(cause)
    assert not others, "what follows from the cause is not told"
    assert f"diagnosis: {cause}" in run.output
