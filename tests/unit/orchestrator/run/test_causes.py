"""Why a run does not learn, from its metrics."""

from collections.abc import Mapping

import pytest

from rlhf.config.loading.load import load_config
from rlhf.orchestrator.run.causes import CauseWatch, find_causes
from rlhf.types import Json

RUN = ["--policy.model", "org/model", "--data.path", "rows.jsonl", "--reward.rules", "math"]
CONFIG = load_config("grpo", RUN, {}).model_dump(mode="json")
HEALTHY: dict[str, Json] = {
    "reward/mean": 0.4,
    "reward/std": 0.5,
    "reward/source/math": 0.4,
    "groups/zero_std": 0.25,
    "response/truncated": 0.1,
    "response/empty": 0.0,
    "data/labeled": 1.0,
    "labels/one_sided": 0.0,
    "advantages/std": 0.9,
    "updates/applied": 8.0,
    "updates/skipped": 0.0,
    "policy/grad_norm": 0.3,
    "policy/lr": 1e-6,
    "mismatch/log_prob": 0.01,
}
NOTHING_LEARNED: dict[str, Json] = {"groups/zero_std": 1.0, "advantages/std": 0.0, "policy/grad_norm": 0.0}
NO_REWARD: dict[str, Json] = NOTHING_LEARNED | {"reward/mean": 0.0, "reward/std": 0.0, "reward/source/math": 0.0}


def with_settings(settings: Mapping[str, Json]) -> Mapping[str, Json]:
    """The config of a run with some settings changed, by dotted key."""
    config = load_config("grpo", RUN, {}).model_dump(mode="json")
    for key, value in settings.items():
        section, _, name = key.partition(".")
        config[section][name] = value
    return config


CASES: list[tuple[str, dict[str, Json], dict[str, Json], str]] = [
    (
        "truncated",
        NO_REWARD | {"response/truncated": 1.0},
        {"rollout.max_response_tokens": 64},
        "all responses were cut at 64 tokens (rollout.max_response_tokens), none ended by itself, so that all "
        "advantages are 0 and nothing is learned.",
    ),
    (
        "truncated",
        {"response/truncated": 1.0},
        {},
        "none ended by itself. Raise the limit, unless the reward is meant for texts that are cut.",
    ),
    (
        "truncated",
        {"response/truncated": 1.0},
        {"algo.truncated": "mask"},
        "none ended by itself, and algo.truncated: mask leaves out all of them.",
    ),
    (
        "truncated",
        {"response/truncated": 1.0, "agent/out_of_turns": 1.0},
        {"rollout.max_turns": 3},
        "all responses were cut after 3 turns (rollout.max_turns), none ended by itself.",
    ),
    (
        "truncated",
        {"response/truncated": 1.0, "agent/out_of_turns": 0.5},
        {"rollout.max_turns": 3, "rollout.max_response_tokens": 64},
        "cut at 64 tokens (rollout.max_response_tokens) or after 3 turns (rollout.max_turns), none ended by itself.",
    ),
    ("labels", NO_REWARD | {"data/labeled": 0.0}, {}, "no row has a label and every reward is 0, so that"),
    (
        "format",
        NO_REWARD | {"reward/source/format": 0.0},
        {},
        "no response has the format that the reward `format` asks for, so that all advantages are 0",
    ),
    ("never_rewarded", NO_REWARD, {}, "the reward `math` is 0 for every response, so that all advantages are 0"),
    (
        "constant_reward",
        NOTHING_LEARNED | {"reward/mean": 1.0, "reward/std": 0.0, "reward/source/math": 1.0},
        {},
        "every response of a step has the same reward (1), so that",
    ),
    (
        "equal_groups",
        NOTHING_LEARNED,
        {"rollout.temperature": 0.1},
        "all responses to the same prompt have the same reward, though prompts differ, so that all advantages are 0",
    ),
    (
        "few_unequal_groups",
        {"groups/zero_std": 0.97},
        {},
        "in 97% of the groups all rewards are equal, so that a step learns from the few others.",
    ),
    ("empty", {"response/empty": 1.0}, {}, "every response is empty: the model ends at once."),
    ("one_label", {"labels/one_sided": 1.0}, {}, "all responses of a step have the same label"),
    (
        "no_update",
        {"updates/applied": 0.0, "updates/skipped": 1.0},
        {},
        "no optimizer step was made: every gradient was not finite.",
    ),
    ("no_update", {"updates/applied": 0.0}, {}, "no optimizer step was made: no example was selected to learn from."),
    (
        "zero_gradient",
        {"policy/grad_norm": 0.0},
        {},
        "the gradient of the policy is 0 because no token that is trained on has an advantage or a loss",
    ),
    (
        "zero_gradient",
        {"policy/grad_norm": 0.0, "advantages/std": 0.0},
        {},
        "is 0 because all advantages are 0, although rewards differ: no weight changes.",
    ),
    (
        "learning_rate",
        {"policy/lr": 1e-12},
        {"policy.lr": 1e-12},
        "the learning rate of the policy is 1e-12 because policy.lr is 1e-12: too small to change float32 weights.",
    ),
    (
        "learning_rate",
        {"policy/lr": 5e-11},
        {"policy.warmup_ratio": 0.9},
        "is 5e-11 because the warm-up is that long (policy.warmup_ratio 0.9 of all optimizer steps): too small",
    ),
    (
        "mismatch",
        {"mismatch/log_prob": 0.4},
        {},
        "sampler and trainer differ by 0.4 nats a token (train.mismatch_warn 0.1): the rollout engine computes",
    ),
    ("mismatch", {"mismatch/log_prob": 0.4}, {"rollout.max_lag": 2}, "responses are up to 2 versions old"),
]


@pytest.mark.parametrize(("kind", "metrics", "settings", "text"), CASES)
def test_each_cause_is_named_once_and_first(
    kind: str, metrics: dict[str, Json], settings: dict[str, Json], text: str
) -> None:
    """Its consequences (equal groups, no gradient) are in its own line and are not told again."""
    causes = find_causes([HEALTHY | metrics], with_settings(settings))
    assert [cause.kind for cause in causes] == [kind]
    assert text in causes[0].text
    assert "\n" not in causes[0].text


def test_a_run_that_learns_has_none() -> None:
    assert find_causes([], CONFIG) == []
    assert find_causes([HEALTHY], CONFIG) == []
    assert find_causes([{"policy/loss": 2.0, "policy/grad_norm": 1.0, "policy/lr": 1e-5}], {}) == []


@pytest.mark.parametrize(("kind", "metrics", "settings", "text"), CASES)
def test_one_good_step_is_enough(kind: str, metrics: dict[str, Json], settings: dict[str, Json], text: str) -> None:
    assert find_causes([HEALTHY | metrics, HEALTHY], with_settings(settings)) == [], (kind, text)


def test_several_causes_are_several_lines() -> None:
    metrics = HEALTHY | NO_REWARD | {"policy/lr": 1e-12, "response/truncated": 1.0}
    kinds = [cause.kind for cause in find_causes([metrics], with_settings({"policy.lr": 1e-12}))]
    assert kinds == ["truncated", "learning_rate"]


def test_the_first_steps_are_looked_at_and_each_cause_is_said_once() -> None:
    said: list[tuple[str, str]] = []
    watch = CauseWatch(CONFIG, lambda kind, text: said.append((kind, text[:14])))
    for step in range(1, 31):
        watch.observe(step, HEALTHY | NO_REWARD | ({"mismatch/log_prob": 0.5} if step >= 1 else {}))
    assert said == [("diagnosis", "after step 1: "), ("diagnosis", "after step 1: ")]


def test_a_good_first_step_ends_it() -> None:
    said: list[str] = []
    watch = CauseWatch(CONFIG, lambda _, text: said.append(text))
    watch.observe(1, HEALTHY)
    for step in range(2, 31):
        watch.observe(step, HEALTHY | NO_REWARD)
    assert said == []
