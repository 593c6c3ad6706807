"""REINFORCE++: PPO's token rewards and clip without a critic; and the same with a baseline."""

from collections.abc import Sequence

from rlhf.algorithms.advantages import Floats, discounted, reward_to_go
from rlhf.algorithms.critic_free import CriticFree
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.responses import ResponseTokens
from rlhf.algorithms.rewards import at_turns
from rlhf.config.algo import ReinforceSection


class Reinforce(CriticFree):
    """A_t = sum of r_s over s >= t, whitened over all tokens of the batch, with
    r_t = -beta * (lp_t - lp_ref_t) + [t is the last token] * score: the batch is the baseline, and one response per
    prompt is enough. With `turn_discount` d, each turn has a score of its own at its last token, and A_t is
    r_t + A_{t+1} within a turn, r_t + d * A_{t+1} at its end.

    Hu et al. 2025, arXiv:2501.03262.
    """

    def __init__(self, section: ReinforceSection) -> None:
        super().__init__(section)
        self._turn_discount = section.turn_discount

    def _placed(self, score: float, response: ResponseTokens) -> Floats:
        return super()._placed(score, response) if self._turn_discount is None else at_turns(score, response)

    def _rewards(self, response: ResponseTokens) -> Floats:
        rewards = super()._rewards(response)
        if self._turn_discount is None:
            return rewards
        return discounted(rewards, [end for end, _ in response.turns], self._turn_discount)

    def advantages(self, rewards: Sequence[Floats], greedy: float | None) -> list[Floats]:
        return [reward_to_go(reward) for reward in rewards]


class ReinforceBaseline(GRPO):
    """A_i = r_i - mean(r) over the responses to one prompt, then whitened over all tokens of the batch; the KL acts in
    the loss.

    Hu et al. 2025, arXiv:2501.03262.
    """
