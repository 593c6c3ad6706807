"""What PPO's settings refuse."""

import pytest
from pydantic import ValidationError

from rlhf.config.algo import AdaptiveKl, FixedKl, PpoSection


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"kl_placement": "loss", "kl_estimator": "k1"}, "kl_estimator", "no gradient"),
        ({"loss": "penalty"}, "num_epochs", ">= 2"),
        ({"target_kl": 0.1}, "target_kl", "only one pass"),
        ({"gamma": 1.2}, "gamma", "less than or equal to 1"),
        ({"gae_lambda": -0.1}, "gae_lambda", "greater than or equal to 0"),
        ({"clip_low": 1.0}, "clip_low", "less than 1"),
        ({"clip_high": float("inf")}, "clip_high", "finite"),
        ({"value_clip": float("nan")}, "value_clip", "finite"),
        ({"entropy_coef": -1}, "entropy_coef", "greater than or equal to 0"),
    ],
)
def test_refused(values: dict[str, object], field: str, says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PpoSection.model_validate(values)
    (error,) = caught.value.errors()
    assert error["loc"] == (field,)
    assert says in error["msg"]


def test_an_adaptive_coefficient_of_0_could_never_move() -> None:
    assert FixedKl(coef=0.0).coef == 0.0
    with pytest.raises(ValidationError, match="greater than 0"):
        AdaptiveKl(coef=0.0)


@pytest.mark.parametrize(
    ("placement", "estimator", "used"),
    [("reward", "auto", "k1"), ("loss", "auto", "k3"), ("reward", "k3", "k3"), ("loss", "k2", "k2")],
)
def test_the_estimator_follows_the_placement(placement: str, estimator: str, used: str) -> None:
    section = PpoSection.model_validate({"kl_placement": placement, "kl_estimator": estimator})
    assert section.estimator == used
