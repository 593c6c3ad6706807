"""Python looks for garbage between steps, and not inside them."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeRollout, FakeTrainEngine
from rlhf.orchestrator.run.garbage import collecting_between_steps
from rlhf.types import Head, Role, TrainBatch
from tests.unit.orchestrator.support import TOKENIZER, ppo_run


class Cycle:
    """Refers to itself: only a search finds that it is garbage."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    gc.unfreeze()
    yield
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_nothing_is_searched_inside_a_step() -> None:
    searched: list[int] = []
    gc.callbacks.append(lambda phase, info: searched.append(info["generation"]))
    try:
        with collecting_between_steps() as collect:
            searched.clear()
            kept = [[number] for number in range(300_000)]
            assert searched == []
            lost = weakref.ref(Cycle())
            assert lost() is not None
            collect()
            assert lost() is None
            assert len(kept) == 300_000
    finally:
        gc.callbacks.pop()


def test_it_goes_on_after_a_step_that_fails() -> None:
    with pytest.raises(ValueError, match="no step"), collecting_between_steps():
        raise ValueError("no step")


def test_who_has_turned_it_off_keeps_that() -> None:
    gc.disable()
    try:
        with collecting_between_steps() as collect:
            lost = weakref.ref(Cycle())
            collect()
            assert lost() is not None
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_objects_that_are_frozen_stay_so() -> None:
    gc.freeze()
    try:
        with collecting_between_steps():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


class Littering(FakeTrainEngine):
    """Leaves garbage in each call, and notes how much of it is left in the next one."""

    def __init__(self, rollout: FakeRollout) -> None:
        super().__init__(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, rollout=rollout)
        self.lost: list[weakref.ref[Cycle]] = []
        self.left: list[int] = []

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self.left.append(sum(one() is not None for one in self.lost))
        self.lost.append(weakref.ref(Cycle()))
        return super().forward_backward(batches)


def test_a_run_searches_after_each_step(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=3, batch_size=16, num_epochs=2)
    run.set_train(batch_size=16)
    engine = run.engines[Role.POLICY] = Littering(run.rollout)
    run.run()
    assert engine.left == [0, 1, 2, 3] * 3
