"""Rules of learning from pairs of the policy's own responses."""

from collections.abc import Iterator

from rlhf.config.algo import NashMdSection, OnlineDpoSection
from rlhf.config.commands import OnlineConfig, OnlineDpoConfig
from rlhf.config.problems import Problem
from rlhf.config.rules.narrow import for_algorithm, for_config


def pairs_exist(config: OnlineDpoConfig) -> Iterator[Problem]:
    """There are two responses to compare."""
    group_size = config.rollout.group_size
    if group_size < 2:
        yield Problem(
            keys=("rollout.group_size",), text="1 response cannot be compared with another. Set it to 2 or more."
        )
    elif group_size > 2 and isinstance(config.algo, NashMdSection):
        yield Problem(
            keys=("rollout.group_size", "algo.type"),
            text=f"nash-md compares one response with its opponent, and needs 2 (got {group_size}).",
        )


def behavior_is_known(config: OnlineConfig, algo: OnlineDpoSection) -> Iterator[Problem]:
    """The behavior policy's log-probs are computed by the trainer, which must still have the same weights."""
    if algo.reference != "behavior":
        return
    if config.rollout.max_lag > 0:
        yield Problem(
            keys=("algo.reference", "rollout.max_lag"),
            text=f"behavior needs the weights that sampled, and with {config.rollout.max_lag} versions "
            "of lag the trainer no longer has them. Set rollout.max_lag to 0, or another reference.",
        )
    if algo.mixture > 0.0:
        yield Problem(
            keys=("algo.mixture", "algo.reference"),
            text=f"{algo.mixture:g} mixes a reference model into sampling, and behavior has none. Set it to 0, or "
            "another reference.",
        )


def nash_is_on_policy(config: OnlineConfig, _algo: NashMdSection) -> Iterator[Problem]:
    """Nash-MD's gradient holds for responses that the current policy sampled."""
    if config.rollout.max_lag > 0:
        yield Problem(
            keys=("rollout.max_lag", "algo.type"),
            text=f"{config.rollout.max_lag} trains off-policy, on responses of older weights, and nash-md does "
            "not correct for it. "
            "Set it to 0.",
        )


PREFERENCE_RULES = (
    for_config(OnlineDpoConfig, pairs_exist),
    for_algorithm(OnlineDpoSection, behavior_is_known),
    for_algorithm(NashMdSection, nash_is_on_policy),
)
