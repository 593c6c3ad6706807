"""GRPO, and the methods that are GRPO with other settings."""

from collections.abc import Sequence

import numpy as np

from rlhf.algorithms.advantages import Floats, group_mean_baseline
from rlhf.algorithms.critic_free import CriticFree


class GRPO(CriticFree):
    """A_i = (r_i - mean(r)) / std(r) over the responses to one prompt, the same at each token of a response. The loss:
    -min(rho_t * A, clip(rho_t) * A) + beta * rho_t * k3 (the ratio: the old policy sampled). `ratio: sequence` with
    `aggregation: seq-mean-token-mean` clips the whole response's ratio instead, as R1 does (DeepSeek-AI 2025,
    arXiv:2501.12948).

    Shao et al. 2024, arXiv:2402.03300.
    """

    def advantages(self, rewards: Sequence[Floats], greedy: float | None) -> list[Floats]:
        advantages = group_mean_baseline(np.array([reward.sum() for reward in rewards]))
        return [np.full(len(reward), one) for reward, one in zip(rewards, advantages, strict=True)]


class DrGRPO(GRPO):
    """A_i = r_i - mean(r), and a response's token losses are summed over a constant instead of its length: neither easy
    prompts nor short responses weigh more.

    Liu et al. 2025, arXiv:2503.20783.
    """


class DAPO(GRPO):
    """GRPO with a higher upper clip, the mean over all tokens of the step, prompts without spread replaced by others,
    and a soft punishment of length (`overlong_buffer`).

    Yu et al. 2025, arXiv:2503.14476.
    """


class GSPO(GRPO):
    """GRPO with s_i = exp(mean_t(lp_t - lp_old_t)) in place of the token's ratio: one ratio and one clip per response,
    -min(s_i * A_i, clip(s_i) * A_i).

    Zheng et al. 2025, arXiv:2507.18071.
    """


class CISPO(GRPO):
    """-sg(clip(rho_t)) * A * lp_t: the clipped ratio only weighs a token, and every token keeps its gradient.

    MiniMax 2025, arXiv:2506.13585.
    """
