"""What a large model meets under ZeRO-3: layers are freed after use and gathered ahead, by the trace of earlier passes.

With DeepSpeed's default thresholds nothing of a tiny model is ever freed or gathered ahead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from rlhf.engines.training.optimizer import scoring_config, training_config
from tests.integration.training_rows import experiences, whole

if TYPE_CHECKING:
    from tests.integration.training_worker import Scenarios

FOUR = (20, None)
LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 10_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 3_000,
    "sub_group_size": 5_000,
}


@contextmanager
def thresholds() -> Iterator[None]:
    """Inside, engines get the thresholds of a large model."""

    def changed(config: dict[str, object]) -> dict[str, object]:
        zero = config["zero_optimization"]
        assert isinstance(zero, dict)
        return {**config, "zero_optimization": zero | LARGE}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.engines.training.engine.training_config", lambda *args: changed(training_config(*args)))
        patch.setattr("rlhf.engines.training.scoring.scoring_config", lambda *args: changed(scoring_config(*args)))
        yield


def large_model(scenarios: "Scenarios") -> None:
    """An export right after a forward pass, and the weights after the steps, beside those of the usual thresholds."""
    with thresholds():
        engine = scenarios.engine(zero_stage=3, lr=1e-2)
    usual = scenarios.engine(zero_stage=3, lr=1e-2)
    for step in range(2):
        scenarios.by_example(engine, whole(experiences()), FOUR)
        scenarios.step(engine, experiences(seed=step), FOUR)
        scenarios.step(usual, experiences(seed=step), FOUR)
    scenarios.by_example(engine, whole(experiences()), FOUR)
    statuses = {vars(parameter)["ds_status"].name for parameter in engine.module.parameters()}
    scenarios.record("large/in_flight", "INFLIGHT" in statuses)
    exported = scenarios.folder / "exports" / "large"
    engine.export(exported)
    engine.check_export(exported)
    scenarios.record("large/same", torch.equal(scenarios.weights(engine), scenarios.weights(usual)))
