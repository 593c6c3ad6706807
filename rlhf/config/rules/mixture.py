"""Rules of sampling from a mixture of policy and reference."""

from collections.abc import Iterator

from rlhf.config.algo import OnlineDpoSection
from rlhf.config.commands import OnlineConfig, OnlineDpoConfig
from rlhf.config.problems import Problem
from rlhf.config.rollout import engines_that
from rlhf.config.rules.narrow import for_algorithm, for_config


def mixture_is_sampled(config: OnlineDpoConfig) -> Iterator[Problem]:
    """The engine can mix two models."""
    if not config.algo.mixture:
        return
    others = engines_that(lambda engine: engine.mixes)
    if config.rollout.engine != "auto" and not config.rollout.expected_traits.mixes:
        yield Problem(
            keys=("rollout.engine", "algo.mixture"),
            text=f"{config.rollout.engine} samples from one model, and cannot mix {config.algo.mixture:g} of the "
            f"reference's logits with the policy's. Use {' or '.join([*others, 'auto'])}.",
        )


def mixed_reference_stays(config: OnlineConfig, algo: OnlineDpoSection) -> Iterator[Problem]:
    """The reference in the mixture is the one that the engines loaded."""
    if algo.mixture and algo.reference in {"refresh", "ema"}:
        yield Problem(
            keys=("algo.mixture", "algo.reference"),
            text=f"{algo.mixture:g} mixes the frozen reference into sampling, but {algo.reference} "
            "follows the policy. Set it to 0, or algo.reference to frozen.",
        )
    if algo.mixture and config.reference.beside(config.policy).quantization != "none":
        yield Problem(
            keys=("reference.quantization", "policy.quantization", "algo.mixture"),
            text="the engines load the reference that they mix in without quantization. Set "
            "reference.quantization to none, or algo.mixture to 0.",
        )


MIXTURE_RULES = (
    for_config(OnlineDpoConfig, mixture_is_sampled),
    for_algorithm(OnlineDpoSection, mixed_reference_stays),
)
