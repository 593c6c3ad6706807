"""REINFORCE++: PPO's token rewards and clip without a critic; and the same with a baseline."""

from collections.abc import Sequence

from rlhf.algorithms.advantages import Floats, reward_to_go
from rlhf.algorithms.critic_free import CriticFree
from rlhf.algorithms.grpo import GRPO


class Reinforce(CriticFree):
    """A_t = sum of r_s over s >= t, whitened over all tokens of the batch, with
    r_t = -beta * (lp_t - lp_ref_t) + [t is the last token] * score: the batch is the baseline, and one response per
    prompt is enough.

    Hu et al. 2025, arXiv:2501.03262.
    """

    def advantages(self, rewards: Sequence[Floats], greedy: float | None) -> list[Floats]:
        return [reward_to_go(reward) for reward in rewards]


class ReinforceBaseline(GRPO):
    """A_i = r_i - mean(r) over the responses to one prompt, then whitened over all tokens of the batch; the KL acts in
    the loss.

    Hu et al. 2025, arXiv:2501.03262.
    """
