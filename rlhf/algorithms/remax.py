"""ReMax: REINFORCE against the greedy response."""

from collections.abc import Sequence

from rlhf.algorithms.advantages import Floats, reward_to_go
from rlhf.algorithms.critic_free import CriticFree


class ReMax(CriticFree):
    """A_t = r(y) - r(greedy response) - beta * sum of (lp_s - lp_ref_s) over s >= t: one more, greedy response to each
    prompt is the baseline.

    Li et al. 2024, arXiv:2310.10505.
    """

    def advantages(self, rewards: Sequence[Floats], greedy: float | None) -> list[Floats]:
        if greedy is None:
            raise ValueError("ReMax needs the score of the greedy response, which the group does not hold")
        return [reward_to_go(reward) - greedy for reward in rewards]
