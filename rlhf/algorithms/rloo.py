"""REINFORCE with a leave-one-out baseline."""

from collections.abc import Sequence

import numpy as np

from rlhf.algorithms.advantages import Floats, leave_one_out
from rlhf.algorithms.critic_free import CriticFree


class RLOO(CriticFree):
    """A_i = r_i - mean of the other responses' rewards, where r_i = score - beta * sum_t(lp_t - lp_ref_t). The response
    is one action, and its own reward is not in its baseline.

    Ahmadian et al. 2024, arXiv:2402.14740.
    """

    def advantages(self, rewards: Sequence[Floats], greedy: float | None) -> list[Floats]:
        advantages = leave_one_out(np.array([reward.sum() for reward in rewards]))
        return [np.full(len(reward), one) for reward, one in zip(rewards, advantages, strict=True)]
