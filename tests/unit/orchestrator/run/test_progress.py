"""What is saved after which step, and what a run that continues takes from a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from rlhf.algorithms.base import Algorithm
from rlhf.engines.base import TrainEngine
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.progress import RunProgress
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.types import Json, Role

FRESH = RunState(
    step=0, seed=3, config={"a": 1}, ranks={"policy": 2}, data_fingerprint="now", token_limit=64, threads="4"
)


class Counting:
    """An algorithm whose state is how often it was asked for it."""

    def __init__(self) -> None:
        self.number = 0
        self.restored: list[Mapping[str, Json]] = []

    def state(self) -> dict[str, Json]:
        self.number += 1
        return {"number": self.number}

    def restore(self, state: Mapping[str, Json]) -> None:
        self.restored.append(state)


class Rows:
    position = 5


class Engine:
    def __init__(self) -> None:
        self.loaded: list[Path] = []

    def load(self, folder: Path) -> None:
        self.loaded.append(folder)


class Saves:
    """Checkpoints that note the step of each save. `refuses` is a disk that is full."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.refuses = False

    def save(self, state: RunState, engines: Mapping[Role, TrainEngine]) -> Path:
        assert set(engines) == {Role.POLICY}
        self.steps.append(f"save {state.step}")
        return Path("saved")

    def try_save(self, state: RunState, engines: Mapping[Role, TrainEngine]) -> Path | None:
        assert set(engines) == {Role.POLICY}
        self.steps.append(f"try {state.step}")
        return None if self.refuses else Path("saved")


class World:
    def __init__(self, rows: Rows | None = None) -> None:
        self.algorithm, self.engine, self.saves = Counting(), Engine(), Saves()
        self.progress = RunProgress(
            FRESH,
            cast(Algorithm, self.algorithm),
            {Role.POLICY: cast(TrainEngine, self.engine)},
            cast(Checkpoints, self.saves),
            pretraining_rows=rows,
            every_steps=3,
            num_steps=8,
        )

    def finish(self, step: int) -> None:
        self.progress.advance(
            step, position=10 * step, ahead=(step,), num_updates=2, recent_updates={"policy": "." * step}
        )
        self.progress.save_if_due()


@pytest.mark.parametrize(("rows", "position"), [(None, 0), (Rows(), 5)])
def test_the_state_is_that_after_the_last_step(rows: Rows | None, position: int) -> None:
    world = World(rows)
    assert world.progress.state == replace(FRESH, algorithm={"number": 1})
    for step in (1, 2):
        world.finish(step)
    assert world.progress.state == replace(
        FRESH,
        step=2,
        position=20,
        ahead=(2,),
        pretraining_position=position,
        num_updates=4,
        recent_updates={"policy": ".."},
        algorithm={"number": 3},
    )


def test_every_third_step_and_the_last_one_are_saved_once() -> None:
    world = World()
    world.progress.save()
    for step in range(1, 9):
        world.finish(step)
    world.progress.save()
    assert world.saves.steps == ["save 0", "try 3", "try 6", "save 8"]


@pytest.mark.parametrize(("refuses", "steps"), [(False, ["try 3"]), (True, ["try 3", "save 3"])])
def test_what_is_saved_is_not_saved_again_and_what_was_refused_is(refuses: bool, steps: list[str]) -> None:
    world = World()
    world.saves.refuses = refuses
    world.finish(3)
    world.progress.save()
    assert world.saves.steps == steps


def test_a_run_continues_with_what_it_is_now_and_what_was_saved() -> None:
    rows = Rows()
    world = World(rows)
    saved = RunState(
        step=6, seed=3, position=60, ahead=(7,), pretraining_position=9, num_updates=12, algorithm={"kl": 0.1},
        config={"a": 2}, ranks={"policy": 1}, data_fingerprint="then", token_limit=8, threads="2",
    )  # fmt: skip
    world.progress.restore(ResumePoint(path=Path("step_6"), state=saved))
    assert world.progress.state == replace(
        saved, config={"a": 1}, ranks={"policy": 2}, data_fingerprint="now", token_limit=64, threads="4"
    )
    assert world.engine.loaded == [Path("step_6/policy")]
    assert world.algorithm.restored == [{"kl": 0.1}]
    assert rows.position == 9
    world.progress.save()
    assert world.saves.steps == [], "it is saved already"
