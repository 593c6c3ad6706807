"""Drawing tokens: the distribution, the filters, the log-probs, and the seed that decides."""

import numpy as np
import pytest
import torch

from rlhf.engines.rollout.sampling import SamplingRows
from rlhf.types import RolloutRequest, Sampling

CPU = torch.device("cpu")


def request(seed: int = 0, max_tokens: int = 8, temperature: float = 1.0, **sampling: float) -> RolloutRequest:
    return RolloutRequest(
        id=f"r{seed}",
        prompt_id="p",
        prompt_token_ids=np.array([1]),
        seed=seed,
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature, **sampling),  # type: ignore[arg-type]
    )


def frequencies(logits: list[float], num_draws: int = 1000, **sampling: float) -> list[float]:
    """How often each token is drawn when the uniform numbers are spread evenly over [0, 1)."""
    one = SamplingRows.of([request(max_tokens=1, **sampling)], CPU)  # type: ignore[arg-type]
    rows = one.select(torch.zeros(num_draws, dtype=torch.int64))
    rows.uniforms[:, 0] = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    tokens, _ = rows.draw(torch.tensor([logits]).expand(num_draws, -1), 0)
    return (torch.bincount(tokens, minlength=len(logits)) / num_draws).tolist()


PROBS = [0.5, 0.3, 0.15, 0.05]
LOGITS = np.log(PROBS).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, [p * p / sum(q * q for q in PROBS) for p in PROBS]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.8}, [0.625, 0.375, 0, 0]),  # 0.5 + 0.3 reach 0.8: the smallest set that does
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),  # top-p of what top-k left
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_defined_probabilities(sampling: dict[str, float], expected: list[float]) -> None:
    drawn = frequencies(LOGITS, **sampling)  # type: ignore[arg-type]
    assert drawn == pytest.approx(expected, abs=1e-3)
    assert [p == 0 for p in drawn] == [p == 0 for p in expected]


@pytest.mark.parametrize("sampling", [{"top_k": 2}, {"top_p": 0.5}, {}])
def test_log_probs_are_of_the_full_distribution_at_the_temperature(sampling: dict[str, float]) -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    rows = SamplingRows.of([request(seed, temperature=0.7, **sampling) for seed in (1, 2)], CPU)  # type: ignore[arg-type]
    tokens, log_probs = rows.draw(logits, 0)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert log_probs.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_greedy_rows_log_prob_is_at_temperature_one() -> None:
    _, log_probs = SamplingRows.of([request(temperature=0.0)], CPU).draw(torch.tensor([LOGITS]), 0)
    assert log_probs.item() == pytest.approx(np.log(0.5))


def test_only_the_seed_decides_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(5, 40)
    alone = [SamplingRows.of([request(seed, max_tokens=3)], CPU) for seed in range(5)]
    together = SamplingRows.of([request(seed, max_tokens=3 + seed) for seed in range(5)], CPU)
    kept = together.select(torch.tensor([4, 2]))
    for step in range(3):
        tokens = together.draw(logits, step)[0].tolist()
        assert tokens == [alone[i].draw(logits[i : i + 1], step)[0].item() for i in range(5)]
        assert kept.draw(logits[[4, 2]], step)[0].tolist() == [tokens[4], tokens[2]]


def test_other_seeds_and_steps_draw_other_tokens() -> None:
    logits = torch.zeros(64, 1000)
    rows = SamplingRows.of([request(seed) for seed in range(64)], CPU)
    first, second = rows.draw(logits, 0)[0], rows.draw(logits, 1)[0]
    assert len(set(first.tolist())) > 50
    assert (first != second).sum() > 60


def test_no_token_of_probability_zero_is_drawn_at_the_ends() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 1 - 2**-53):
        rows = SamplingRows.of([request()], CPU)
        rows.uniforms[:] = uniform
        assert rows.draw(logits, 0)[0].item() == 1
