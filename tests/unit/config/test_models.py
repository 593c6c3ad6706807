"""What ranks make of a model's section."""

import pytest

from rlhf.config.models import ModelSection, TrainedModelSection


@pytest.mark.parametrize(
    ("section", "alone", "alone_in_float32"),
    [
        (TrainedModelSection(), 2, 0),
        (TrainedModelSection(zero_stage=2), 2, 2),
        (TrainedModelSection(zero_stage=1), 1, 1),
        (TrainedModelSection(zero_stage=0), 0, 0),
        (TrainedModelSection(offload_optimizer=True), 3, 3),
        (TrainedModelSection(swap_optimizer=True), 3, 3),
        (TrainedModelSection(offload_parameters=True), 3, 3),
        (ModelSection(), 0, 0),
        (ModelSection(zero_stage=0), 0, 0),
        (ModelSection(offload_parameters=True), 3, 3),
    ],
)
def test_one_rank_alone_has_nobody_to_share_with(section: ModelSection, alone: int, alone_in_float32: int) -> None:
    assert section.stage_on(1, is_float32=False) == alone
    assert section.stage_on(1, is_float32=True) == alone_in_float32
    for is_float32 in (False, True):
        assert section.stage_on(2, is_float32=is_float32) == section.zero_stage
