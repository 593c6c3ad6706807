"""The metrics of a step, put together from their producers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf.orchestrator.step.metrics import GpuBudget, flatten, lag_metrics, merge, throughput_metrics
from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.types import Example, Metrics, ScoredGroup, TokenSequence
from tests.unit.orchestrator.support import as_sampled, given_group


def test_metrics_are_sorted_by_name() -> None:
    merged = merge({"credit": {"kl/coef": 0.1}, "responses": {"reward/mean": 1.0}, "time": {}, "loop": {"data/x": 2.0}})
    assert list(merged.items()) == [("data/x", 2.0), ("kl/coef", 0.1), ("reward/mean", 1.0)]


def test_two_producers_of_one_metric_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metric reward/mean: produced by responses and by credit\."):
        merge({"responses": {"reward/mean": 1.0}, "credit": {"kl/coef": 0.1, "reward/mean": 1.0}})
    with pytest.raises(ValueError, match=r"metric policy/ratio: produced by means and by maxima\."):
        flatten(Metrics(sums={"policy/ratio": 1.0}, maxima={"policy/ratio": 2.0}))


def examples_of(*lengths: int) -> list[Example]:
    return [
        Example(
            id="e",
            sequences=(TokenSequence(token_ids=np.zeros(n, dtype=np.int64), loss_mask=np.ones(n, dtype=np.bool_)),),
            rewards=(0.0,),
        )
        for n in lengths
    ]


def test_throughput_by_hand() -> None:
    """30 tokens in 2 s on 3 GPUs; a token costs 10 operations and one for each token of context, half of the sequence
    on average: 10 * (10 + 5) + 20 * (10 + 10) = 550."""
    batch = GroupBatch(groups=(), position=0, metrics={"rollout/tokens": 40.0}, seconds={"generate": 0.5})
    gpus = GpuBudget(num_gpus=3, peak_flops=1000.0, training_flops=lambda context: 10.0 + context)
    assert throughput_metrics(2.0, batch, examples_of(10, 20), gpus) == pytest.approx(
        {
            "throughput/tokens_per_s": 15.0,
            "throughput/tokens_per_s_per_gpu": 5.0,
            "throughput/mfu": 550 / 2.0 / 3000.0,
            "throughput/generation_share": 0.25,
            "throughput/generated_tokens_per_s": 80.0,
        }
    )


def test_utilization_needs_the_peak_of_the_gpu_and_the_size_of_the_model() -> None:
    batch = GroupBatch(groups=(), position=0)
    for gpus in (GpuBudget(num_gpus=2, peak_flops=1.0), GpuBudget(num_gpus=2, training_flops=math.sqrt)):
        names = {"throughput/tokens_per_s", "throughput/tokens_per_s_per_gpu"}
        assert set(throughput_metrics(1.0, batch, examples_of(4), gpus)) == names
    assert set(throughput_metrics(1.0, batch, [], None)) == {"throughput/tokens_per_s"}


def test_ages_by_hand() -> None:
    def sampled_by(*versions: int) -> ScoredGroup:
        group = as_sampled(given_group(0, ["a"] * len(versions), [0.0] * len(versions)))
        responses = zip(group.rollouts, versions, strict=True)
        return replace(group, responses=tuple(replace(one, weight_version=version) for one, version in responses))

    assert lag_metrics([sampled_by(7, 7), sampled_by(5, 6)], version=7, max_lag=3) == {
        "rollout/lag/0": 0.5,
        "rollout/lag/1": 0.25,
        "rollout/lag/2": 0.25,
        "rollout/lag/3": 0.0,
        "rollout/weight_version": 7.0,
        "rollout/lag_mean": 0.75,
        "rollout/lag_max": 2.0,
    }
