"""Credit: what each action was worth. Numpy in float64, on the driver, over the model's own tokens only.

Arrays hold one entry a *model* token: what an environment or a user wrote into an answer was taken out before, so
that no recursion steps through it.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def gae(rewards: Floats, values: Floats, *, gamma: float, gae_lambda: float) -> tuple[Floats, Floats]:
    """Generalised advantage estimation (Schulman et al. 2016): [n], [n] -> advantages [n], returns [n].

    delta_t = r_t + gamma * V_{t+1} - V_t with V_n = 0; A_t = sum_l (gamma * lambda)^l delta_{t+l}; the return is
    A_t + V_t.
    """
    deltas = rewards + gamma * np.append(values[1:], 0.0)[: len(values)] - values
    decay = gamma * gae_lambda
    backwards = accumulate(deltas[::-1].tolist(), lambda later, delta: delta + decay * later)
    advantages = np.array(list(backwards), dtype=np.float64)[::-1]
    return advantages, advantages + values


def whole_answer(rewards: Floats, values: Floats) -> tuple[Floats, Floats]:
    """The whole answer is one action, taken in the prompt's state: [n], [n] -> advantage [1], return [1].

    An answer without tokens is no action: both are empty.
    """
    returns = rewards.sum(keepdims=True) if len(rewards) else rewards
    return returns - values[:1], returns


def whiten(advantages: Sequence[Floats]) -> list[Floats]:
    """Shift and scale to mean 0 and (population) variance 1 over all actions of all answers.

    Equal advantages become exactly 0, which no epsilon beside the deviation would do.
    """
    joined = np.concatenate([*advantages, np.zeros(0)])
    if not len(joined) or joined.max() == joined.min():
        return [np.zeros_like(one) for one in advantages]
    mean, deviation = joined.mean(), joined.std() + 1e-8
    return [(one - mean) / deviation for one in advantages]


def explained_variance(advantages: Floats, returns: Floats) -> float:
    """Share of the returns' variance that the critic foresaw: 1 - Var(return - V) / Var(return), where A = return - V.

    0 where the returns do not vary.
    """
    if not len(returns) or returns.max() == returns.min():
        return 0.0
    return float(1.0 - advantages.var() / returns.var())
