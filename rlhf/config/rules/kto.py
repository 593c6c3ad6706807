"""Rules of KTO runs."""

from collections.abc import Iterator

from rlhf.config.algo import KtoSection, OnlineKtoSection
from rlhf.config.commands import OnlineKtoConfig, TrainConfig
from rlhf.config.problems import Problem
from rlhf.config.rules.narrow import for_config


def one_update(config: OnlineKtoConfig) -> Iterator[Problem]:
    """z0 is estimated over one optimizer step, by the policy before that step."""
    size, total = config.train.batch_size, config.examples_per_step
    if size != total:
        text = (
            f"online KTO learns from a step's responses at once (got {size}). Set it to {total} = "
            "batch_size*group_size."
        )
        yield Problem(keys=("train.batch_size", "rollout.batch_size", "rollout.group_size"), text=text)


def answers_to_compare(config: OnlineKtoConfig) -> Iterator[Problem]:
    """A mean needs several responses."""
    if config.algo.threshold == "group-mean" and config.rollout.group_size < 2:
        text = (
            "1 response is its own mean, and group-mean leaves it out. Raise it, or use threshold batch-mean or fixed."
        )
        yield Problem(keys=("rollout.group_size", "algo.threshold"), text=text)
    if config.algo.threshold == "batch-mean" and config.examples_per_step < 2:
        text = "1 response is its own mean, and batch-mean leaves it out. Raise it, or use threshold fixed."
        yield Problem(keys=("rollout.batch_size", "algo.threshold"), text=text)
    if config.algo.threshold != "fixed" and config.algo.threshold_score != 0.0:
        text = f"{config.algo.threshold_score:g} is only used by threshold fixed (got {config.algo.threshold})."
        yield Problem(keys=("algo.threshold_score", "algo.threshold"), text=text)


def weights_used(config: TrainConfig) -> Iterator[Problem]:
    """Class weights that are given are used."""
    algo = config.algo
    if not isinstance(algo, KtoSection | OnlineKtoSection) or algo.class_weights == "given":
        return
    for name, value in (
        ("desirable_weight", algo.desirable_weight),
        ("undesirable_weight", algo.undesirable_weight),
    ):
        if value != 1.0:
            text = f"{value:g} has no effect with algo.class_weights auto. Set class_weights to given."
            yield Problem(keys=(f"algo.{name}", "algo.class_weights"), text=text)


KTO_RULES = (for_config(OnlineKtoConfig, one_update, answers_to_compare), weights_used)
