"""Rules of learning from pairs of the policy's own answers."""

from collections.abc import Iterator

from rlhf.config.algo import NashMdSection, OnlineDpoSection
from rlhf.config.commands import OnlineConfig, OnlineDpoConfig
from rlhf.config.problems import Problem
from rlhf.config.rules.narrow import for_algorithm, for_config


def pairs_exist(config: OnlineDpoConfig) -> Iterator[Problem]:
    """There are two answers to compare."""
    group_size = config.rollout.group_size
    if group_size < 2:
        yield Problem(
            keys=("rollout.group_size",), text="1 answer has no other to be compared with. Set it to 2 or more."
        )
    elif group_size > 2 and isinstance(config.algo, NashMdSection):
        yield Problem(
            keys=("rollout.group_size", "algo.type"),
            text=f"nash-md compares one answer with its opponent, and needs 2 (got {group_size}).",
        )


def behavior_is_known(config: OnlineConfig, algo: OnlineDpoSection) -> Iterator[Problem]:
    """What the behavior policy thought of its answers is measured by the policy of the same version."""
    if algo.reference != "behavior":
        return
    if config.rollout.max_lag > 0:
        yield Problem(
            keys=("algo.reference", "rollout.max_lag"),
            text=f"behavior holds the policy to the weights that sampled, and with {config.rollout.max_lag} versions "
            "of lag the trainer no longer has them. Set rollout.max_lag to 0, or another reference.",
        )
    if algo.mixture > 0.0:
        yield Problem(
            keys=("algo.mixture", "algo.reference"),
            text=f"{algo.mixture:g} mixes a reference into the sampling, and behavior has none. Set it to 0, or "
            "another reference.",
        )


def nash_is_on_policy(config: OnlineConfig, _algo: NashMdSection) -> Iterator[Problem]:
    """Nash-MD's gradient is that of answers which the policy itself sampled."""
    if config.rollout.max_lag > 0:
        yield Problem(
            keys=("rollout.max_lag", "algo.type"),
            text=f"{config.rollout.max_lag} trains on answers of older weights, and nash-md does not correct for it. "
            "Set it to 0.",
        )


PREFERENCE_RULES = (
    for_config(OnlineDpoConfig, pairs_exist),
    for_algorithm(OnlineDpoSection, behavior_is_known),
    for_algorithm(NashMdSection, nash_is_on_policy),
)
