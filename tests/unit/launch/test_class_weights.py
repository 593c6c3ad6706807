"""KTO's class weights from the whole data set."""

import logging

import pytest

from rlhf.config.algo import KtoSection, SftSection
from rlhf.launch.class_weights import weigh_classes
from rlhf.types import ScoredGroup
from tests.unit.algorithms.build import group, rollout


def labeled(good: int, bad: int) -> list[ScoredGroup]:
    return [group([rollout([1])], [float(n < good)], labels=[n < good]) for n in range(good + bad)]


def test_auto_weights_make_both_labels_count_the_same() -> None:
    section = weigh_classes(KtoSection(), labeled(2, 6))
    assert isinstance(section, KtoSection)
    assert (section.class_weights, section.desirable_weight, section.undesirable_weight) == ("given", 3.0, 1.0)


@pytest.mark.parametrize(
    ("good", "bad", "desirable", "undesirable", "share"),
    [
        (4, 4, 1.0, 1.0, None),
        (4, 3, 1.0, 1.0, None),
        (3, 1, 0.4, 1.0, None),
        (5, 3, 1.0, 1.0, "1.67"),
        (3, 4, 1.0, 1.0, "0.75"),
        (4, 4, 1.0, 2.0, "0.5"),
    ],
)
def test_given_weights_stay_with_a_warning_outside_1_to_4_thirds(
    good: int, bad: int, desirable: float, undesirable: float, share: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    section = KtoSection(class_weights="given", desirable_weight=desirable, undesirable_weight=undesirable)
    with caplog.at_level(logging.WARNING):
        assert weigh_classes(section, labeled(good, bad)) == section
    assert len(caplog.messages) == (share is not None)
    if share is not None:
        expected = f"{good} good responses weigh {share} times as much as {bad} bad ones; 1 to 1.33 is advised."
        assert expected in caplog.messages[0]


def test_other_algorithms_are_left_alone() -> None:
    assert weigh_classes(SftSection(), labeled(1, 1)) == SftSection()
