"""Advantage estimators, in numpy float64, on the driver.

Arrays hold one entry per token that the model wrote: tokens of an environment or a user were removed before, so
recursions over time (GAE, reward-to-go) skip them.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from rlhf.algorithms.chunks import chunks, split

Floats = npt.NDArray[np.float64]
GAE_RESPONSES = 512
"""Responses whose recursions over time run together."""


def gae(
    rewards: Floats, values: Floats, *, gamma: float, gae_lambda: float, end_value: float = 0.0
) -> tuple[Floats, Floats]:
    """Generalized advantage estimation (Schulman et al. 2016): [n], [n] -> advantages [n], returns [n].

    delta_t = r_t + gamma * V_{t+1} - V_t with V_n = `end_value`, 0 for a response that ended; A_t = sum_l (gamma *
    lambda)^l delta_{t+l}; the return is A_t + V_t.
    """
    (of_response,) = gae_of_all([rewards], [values], [end_value], gamma=gamma, gae_lambda=gae_lambda)
    return of_response


def gae_of_all(
    rewards: Sequence[Floats],
    values: Sequence[Floats],
    end_values: Sequence[float],
    *,
    gamma: float | Sequence[Floats],
    gae_lambda: float,
) -> list[tuple[Floats, Floats]]:
    """`gae` of many responses; `gamma` may be an array for each of them: the discount of what follows each token."""
    gammas = [np.full(len(one), gamma) for one in values] if isinstance(gamma, float | int) else gamma
    together = zip(
        chunks(rewards, GAE_RESPONSES),
        chunks(values, GAE_RESPONSES),
        chunks(end_values, GAE_RESPONSES),
        chunks(gammas, GAE_RESPONSES),
        strict=True,
    )
    return list(chain.from_iterable(_gae_of_chunk(*each, gae_lambda) for each in together))


def _gae_of_chunk(
    rewards: Sequence[Floats],
    values: Sequence[Floats],
    end_values: Sequence[float],
    gammas: Sequence[Floats],
    gae_lambda: float,
) -> Iterable[tuple[Floats, Floats]]:
    """From the last token to the first, in all responses at the same time."""
    lengths = np.array([len(one) for one in values])
    ends = np.cumsum(lengths)
    joined = np.concatenate(values)
    following = np.append(joined[1:], 0.0)[: len(joined)]
    following[ends[lengths > 0] - 1] = np.array(end_values)[lengths > 0]
    # Row t is about the token t places before the last one of each response.
    place = np.repeat(ends, lengths) - 1 - np.arange(len(joined)), np.repeat(np.arange(len(values)), lengths)
    table, decay = np.zeros((2, lengths.max(), len(values)))
    gamma = np.concatenate(gammas)
    table[place] = np.concatenate(rewards) + gamma * following - joined
    decay[place] = gamma * gae_lambda
    for t in range(1, len(table)):
        table[t] += decay[t] * table[t - 1]
    advantages = table[place]
    return zip(split(advantages, lengths.tolist()), split(advantages + joined, lengths.tolist()), strict=True)


def whole_response(rewards: Floats, values: Floats) -> tuple[Floats, Floats]:
    """The whole response is one action, taken in the prompt's state: [n], [n] -> advantage [1], return [1].

    For a response without tokens both are empty.
    """
    returns = rewards.sum(keepdims=True) if len(rewards) else rewards
    return returns - values[:1], returns


def reward_to_go(rewards: Floats) -> Floats:
    """[n] -> [n]: the sum of the rewards from each token on, its own included (no discount)."""
    total: Floats = np.cumsum(rewards[::-1])[::-1]
    return total


def discounted(rewards: Floats, ends: Sequence[int], discount: float) -> Floats:
    """[n] -> [n]: rewards whose plain sums from each token on (`reward_to_go`) are those of `rewards` discounted by
    `discount` after each of the tokens `ends`.

    >>> discounted(np.array([0.0, 1.0, 2.0]), [1], 0.5).tolist()
    [0.0, 0.0, 2.0]
    """
    bounds = sorted({0, *(end + 1 for end in ends), len(rewards)})
    to_go = np.zeros(len(rewards) + 1)
    for start, end in reversed(list(pairwise(bounds))):
        after = to_go[end] * (discount if end - 1 in ends else 1.0)
        to_go[start:end] = reward_to_go(rewards[start:end]) + after
    difference: Floats = to_go[:-1] - to_go[1:]
    return difference


def are_equal(rewards: Floats) -> bool:
    """Whether all rewards are equal, compared exactly. Subtracting a mean would leave a rounding error, which division
    by a deviation near 0 would make large."""
    return not len(rewards) or bool(rewards.max() == rewards.min())


def group_mean_baseline(rewards: Floats) -> Floats:
    """r_i - mean(r), of one prompt's responses (Shao et al. 2024); exactly 0 where they are equal."""
    return np.zeros_like(rewards) if are_equal(rewards) else rewards - float(rewards.mean())


def leave_one_out(rewards: Floats) -> Floats:
    """r_i - mean of the others, of one prompt's responses (Kool et al. 2019); exactly 0 where they are equal."""
    if are_equal(rewards):
        return np.zeros_like(rewards)
    return rewards - (float(rewards.sum()) - rewards) / (len(rewards) - 1)


def deviation(numbers: Floats, *, sample: bool) -> float:
    """Standard deviation by n, or by n - 1 for that of a sample; 0 of fewer than two numbers."""
    return float(numbers.std(ddof=int(sample))) if len(numbers) > 1 else 0.0


def whiten(advantages: Sequence[Floats], *, sample: bool = False) -> list[Floats]:
    """Shift and scale to mean 0 and variance 1 over all actions of all responses.

    Equal advantages become exactly 0.
    """
    joined = np.concatenate([*advantages, np.zeros(0)])
    if are_equal(joined):
        return [np.zeros_like(one) for one in advantages]
    mean, scale = joined.mean(), deviation(joined, sample=sample) + 1e-8
    return [(one - mean) / scale for one in advantages]


def explained_variance(advantages: Floats, returns: Floats) -> float:
    """Share of the returns' variance that the critic explains: 1 - Var(return - V) / Var(return), where A = return - V.

    0 where the returns do not vary.
    """
    if not len(returns) or returns.max() == returns.min():
        return 0.0
    return float(1.0 - advantages.var() / returns.var())
