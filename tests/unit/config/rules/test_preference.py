"""Combinations of settings of online DPO and Nash-MD that make no sense, each with its reason."""

import pytest

from rlhf.config.commands import OnlineDpoConfig
from rlhf.config.rules.all_rules import problems_of

GIVEN = {"policy": {"model": "m"}, "data": {"path": "p"}, "reward": {"function": "a:b"}}


def keys_of(algo: dict[str, object], rollout: dict[str, object]) -> list[tuple[str, ...]]:
    config = OnlineDpoConfig.model_validate({**GIVEN, "algo": algo, "rollout": {"batch_size": 64, **rollout}})
    return [problem.keys for problem in problems_of(config)]


@pytest.mark.parametrize(
    ("algo", "rollout", "keys"),
    [
        ({}, {"group_size": 1}, ("rollout.group_size",)),
        ({"type": "nash-md"}, {"group_size": 4}, ("rollout.group_size", "algo.type")),
        ({"type": "nash-md"}, {"max_lag": 1}, ("rollout.max_lag", "algo.type")),
        ({"reference": "behavior"}, {"max_lag": 2}, ("algo.reference", "rollout.max_lag")),
        ({"reference": "behavior", "mixture": 0.5}, {}, ("algo.mixture", "algo.reference")),
    ],
)
def test_refused(algo: dict[str, object], rollout: dict[str, object], keys: tuple[str, ...]) -> None:
    assert keys in keys_of({"type": "online-dpo", **algo}, rollout)


@pytest.mark.parametrize(
    ("algo", "rollout"),
    [
        ({}, {}),
        ({}, {"group_size": 8, "max_lag": 4}),
        ({"reference": "behavior"}, {}),
        ({"type": "nash-md"}, {}),
    ],
)
def test_accepted(algo: dict[str, object], rollout: dict[str, object]) -> None:
    assert keys_of({"type": "online-dpo", **algo}, rollout) == []
