"""What DeepSpeed is told."""

import pytest
import torch

from rlhf.config.models import TrainedModelSection
from rlhf.engines.training.optimizer import training_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_communication_overlaps_on_gpus_where_deepspeed_allows_it(stage: int) -> None:
    """In stages 0 and 1 DeepSpeed refuses it to engines that end their window of accumulation themselves."""
    section = TrainedModelSection.model_validate({"zero_stage": stage})
    for device, expected in (("cuda", stage >= 2), ("cpu", False)):
        zero = training_config(section, torch.bfloat16, torch.device(device))["zero_optimization"]
        assert isinstance(zero, dict)
        assert zero["overlap_comm"] is expected
