"""Advantages that are scaled by the rewards of the whole batch."""

import numpy as np

from rlhf.algorithms.grpo import GRPO
from rlhf.config.algo import FixedKl, GrpoSection, NoCorrection
from rlhf.types import Signal
from tests.unit.algorithms.build import group, rollout, signals


def test_rewards_of_the_whole_batch_scale_it_as_trl_does() -> None:
    """TRL's scale_rewards "batch": (r - mean of the group) / (std of all rewards + 1e-4), with n - 1."""
    rewards = {"p": [1.0, 0.0, 0.5, 1.0], "q": [4.0, 2.0, 4.0, 4.0]}
    section = GrpoSection(kl=FixedKl(coef=0.0), correction=NoCorrection(), scale="batch-rewards", std="sample")
    algorithm = GRPO(section)
    groups = [
        group([rollout([5], name=f"{name}{i}") for i in range(4)], of_group, name=name)
        for name, of_group in rewards.items()
    ]
    examples = algorithm.select(groups)
    experiences, _ = algorithm.credit(examples, [signals(one, old=[-1.0], values=[0.0]) for one in examples])
    got = [one.sequences[0].signals[Signal.ADVANTAGES][one.sequences[0].loss_mask].item() for one in experiences]
    every = np.array([*rewards["p"], *rewards["q"]])
    expected = [(r - np.mean(of)) / every.std(ddof=1) for of in rewards.values() for r in of]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
