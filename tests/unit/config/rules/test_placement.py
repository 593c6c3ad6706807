"""What is said about --colocate flags that name models which the run does not have."""

import pytest

from rlhf.config.loading.load import load_config
from rlhf.config.rules.all_rules import advice_on

RUN = ("--policy.model", "m", "--data.path", "d.jsonl", "--reward.rules", "length")


@pytest.mark.parametrize(
    ("method", "flag", "texts"),
    [
        ("grpo", "policy,critic", ["this run has no critic, so policy,critic shares no devices with it."]),
        (
            "grpo",
            "policy,critic,reward",
            ["this run has no critic and no reward, so policy,critic,reward shares no devices with it."],
        ),
        ("ppo", "policy,critic", []),
        ("ppo", "all", []),
        ("grpo", "policy,rollout", []),
    ],
)
def test_an_absent_model_is_named(method: str, flag: str, texts: list[str]) -> None:
    advice = advice_on(load_config(method, [*RUN, "--colocate", flag], {}))
    assert [one.text for one in advice if one.keys == ("cluster.colocate",)] == texts
