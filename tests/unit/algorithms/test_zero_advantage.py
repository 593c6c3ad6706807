"""A run of a critic-free method that learns nothing says so, once."""

import numpy as np

from rlhf.algorithms.zero_advantage import PATIENCE_STEPS, ZeroAdvantageWatch
from rlhf.config.algo import CriticFreeSection, GrpoSection, ReinforceSection
from rlhf.types import ScoredGroup
from tests.unit.algorithms.test_critic_free import PLAIN, build, grouped, said


def test_ten_steps_without_a_difference_are_told_once_also_after_a_restart() -> None:
    equal, different = grouped([1.0, 1.0], lengths=[2, 2]), grouped([1.0, 0.0], lengths=[2, 2])
    algorithm = build(GrpoSection(**PLAIN))

    def warned(group: ScoredGroup) -> bool:
        examples = algorithm.select([group])
        _, metrics = algorithm.credit(examples, [said(example) for example in examples])
        return any("same reward" in text for text in metrics.warnings)

    assert not any(warned(equal) for _ in range(9))
    assert not warned(different), "one step that tells them apart begins anew"
    assert not any(warned(equal) for _ in range(4))
    state, algorithm = algorithm.state(), build(GrpoSection(**PLAIN))
    algorithm.restore(state)
    assert [warned(equal) for _ in range(8)] == [False] * 5 + [True, False, False]


def test_steps_without_a_token_are_not_counted() -> None:
    watch = ZeroAdvantageWatch()
    for _ in range(PATIENCE_STEPS):
        watch.observe(np.zeros(0))
    assert watch.warnings() == ()
    for _ in range(PATIENCE_STEPS):
        watch.observe(np.zeros(3))
    assert len(watch.warnings()) == 1


def test_groups_that_differ_from_each_other_teach_where_the_batch_is_the_baseline() -> None:
    good, bad = grouped([1.0, 1.0], lengths=[2, 2]), grouped([0.0, 0.0], lengths=[2, 2], name="q")

    def warnings(section: CriticFreeSection) -> list[str]:
        algorithm = build(section)
        examples = algorithm.select([good, bad])
        signals = [said(example) for example in examples]
        return [text for _ in range(12) for text in algorithm.credit(examples, signals)[1].warnings]

    assert warnings(ReinforceSection(**PLAIN)) == []
    assert len(warnings(GrpoSection(**PLAIN))) == 1
