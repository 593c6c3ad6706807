"""When memory runs out: the run starts again with smaller micro-batches and learns the same, or ends with advice."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rlhf.errors import MemoryExhaustedError
from rlhf.types import Role
from tests.unit.orchestrator.counted import CallCounter, counted_run
from tests.unit.orchestrator.run.test_recovery import run_through_failures
from tests.unit.orchestrator.support import Run

pytestmark = pytest.mark.timeout(120)

TEXT = "policy forward_backward: out of memory with micro-batches of up to 14 tokens. Lower train.max_tokens"


def exhausted(tokens: int) -> None:
    raise MemoryExhaustedError(TEXT, tokens)


def tables_of(run: Run) -> dict[Role, np.ndarray]:
    return {role: engine.table for role, engine in run.engines.items()}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.orchestrator.run.recovery.LONGEST_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = counted_run(tmp_path_factory.mktemp("whole") / "a", CallCounter(0, lambda: exhausted(0)))
    run.run()
    return run


class ThirdCall(CallCounter):
    """Runs out of memory at the third call of a phase, of any engine."""

    def __init__(self, phase: str) -> None:
        super().__init__(0, lambda: None)
        self._phase = phase

    def count(self, name: str) -> None:
        super().count(name)
        if name.endswith(self._phase) and sum(known.endswith(self._phase) for known in self.names) == 3:
            exhausted(14)


@pytest.mark.parametrize(
    "phase", ["generate", "score", "forward", "forward_backward", "optim_step", "send_weights", "save"]
)
def test_half_micro_batches_learn_the_same(tmp_path: Path, peaceful: Run, phase: str) -> None:
    def make(number: int) -> Run:
        run = counted_run(tmp_path / "a", CallCounter(0, lambda: None) if number else ThirdCall(phase))
        run.set_train(max_tokens_per_micro_batch=run.train.max_tokens_per_micro_batch if number <= 0 else 7)
        return run

    launches, notes = run_through_failures(tmp_path / "a", make)
    assert launches.limits == [7]
    (note,) = [note for note in notes if note.startswith("restart")]
    assert note.startswith(f"restart: {TEXT} From here on at most 7 tokens. Everything starts again after step ")
    for role, table in tables_of(launches.runs[-1]).items():
        np.testing.assert_allclose(table, tables_of(peaceful)[role], rtol=0, atol=1e-6)


def test_what_cannot_be_split_ends_the_run_with_the_saved_step(tmp_path: Path) -> None:
    numbers: list[int] = []

    def make(number: int) -> Run:
        numbers.append(number)
        return counted_run(tmp_path / "a", CallCounter(40, lambda: exhausted(0)))

    with pytest.raises(MemoryExhaustedError) as caught:
        run_through_failures(tmp_path / "a", make)
    assert max(numbers) == 0, "another start would meet it again"
    assert re.fullmatch(rf"{re.escape(TEXT)} Step \d is saved; continue with --resume\.", str(caught.value))
    assert caught.value.exit_code == 7
    assert "MemoryExhaustedError" in json.loads((tmp_path / "a/status.json").read_text())["error"]
