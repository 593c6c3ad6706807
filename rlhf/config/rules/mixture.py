"""Rules of sampling from a mixture of policy and reference."""

from collections.abc import Iterator

from rlhf.config.algo import OnlineDpoSection
from rlhf.config.commands import OnlineDpoConfig, TrainConfig
from rlhf.config.problems import Problem
from rlhf.config.rollout import engines_that


def mixture_is_sampled(config: TrainConfig) -> Iterator[Problem]:
    """An engine that can mix two models samples."""
    if not isinstance(config, OnlineDpoConfig) or not config.algo.mixture:
        return
    others = engines_that(lambda engine: engine.mixes)
    if config.rollout.engine != "auto" and not config.rollout.expected_traits.mixes:
        yield Problem(
            keys=("rollout.engine", "algo.mixture"),
            text=f"{config.rollout.engine} samples from one model, and cannot mix {config.algo.mixture:g} of the "
            f"reference's logits with the policy's. Use {' or '.join([*others, 'auto'])}.",
        )


def mixed_reference_stays(config: TrainConfig) -> Iterator[Problem]:
    """The reference in the mixture is the one that the engines loaded."""
    if not isinstance(config, OnlineDpoConfig) or not isinstance(config.algo, OnlineDpoSection):
        return
    if config.algo.mixture and config.algo.reference in {"refresh", "ema"}:
        yield Problem(
            keys=("algo.mixture", "algo.reference"),
            text=f"{config.algo.mixture:g} mixes the frozen reference into the sampling, and {config.algo.reference} "
            "follows the policy. Set it to 0, or algo.reference to frozen.",
        )
    if config.algo.mixture and config.reference.beside(config.policy).quantization != "none":
        yield Problem(
            keys=("reference.quantization", "policy.quantization", "algo.mixture"),
            text="the engines mix in the reference as its model says, and hold nothing in 4 bits. Set "
            "reference.quantization to none, or algo.mixture to 0.",
        )


MIXTURE_RULES = (mixture_is_sampled, mixed_reference_stays)
