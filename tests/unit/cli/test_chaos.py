"""Faults come in the phase that they name, a saved step apart, and all processes meet all phases."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlhf.cli.chaos import draw, first_difference, tear
from rlhf.cli.chaos_child import DRIVER, Fault, Injector
from rlhf.config.tools import ChaosConfig
from rlhf.types import Json

STEP = (
    *("rollout generation 0", "scoring", "policy forward", "reference forward", "critic forward"),
    *("policy forward_backward", "critic forward_backward", "policy optim_step", "critic optim_step"),
    *("weight sync of version 1", "reading of memory", "policy save", "critic save"),
)
START = ("start of processes", "policy export", "policy trial of export", "policy save", "critic save")


def fault(number: int, phase: str) -> Fault:
    return Fault(number=number, kind="kill", process="policy rank 0", phase=phase)


def struck(faults: list[Fault], waits: list[str]) -> list[tuple[int, int, str]]:
    """Which fault struck in which wait, by its place among `waits`."""
    found: list[tuple[int, int, str]] = []
    passed: list[str] = []
    injector = Injector(faults, lambda one, text, _: found.append((one.number, len(passed), text)), lambda _: None)
    for text in waits:
        injector.wait_started(text)
        passed.append(text)
    return found


def test_a_fault_strikes_in_its_phase_once_a_step_was_saved() -> None:
    waits = [*START, *STEP, *STEP, *STEP]
    faults = [fault(0, "learn"), fault(1, "generate"), fault(2, "checkpoint")]
    assert struck(faults, waits) == [
        (1, 5, "rollout generation 0"),  # learning has not been seen yet
        (0, 23, "policy forward_backward"),
        (2, 42, "policy save"),
    ]


def test_what_is_killed_in_a_save_is_needed_once_before_another_is_killed() -> None:
    waits = [*START, *STEP, *STEP, *STEP, *STEP]
    faults = [fault(0, "checkpoint"), fault(1, "generate")]
    assert struck(faults, waits) == [(0, 16, "policy save"), (1, 31, "rollout generation 0")]


def test_rollouts_that_run_ahead_end_no_save() -> None:
    ahead = [*STEP[:-1], "rollout generation 0", "critic save"]
    waits = [*START, *ahead, *STEP, *STEP]
    faults = [fault(0, "checkpoint"), fault(1, "log_probs")]
    assert struck(faults, waits) == [(0, 16, "policy save"), (1, 34, "policy forward")]


def test_no_save_counts_before_the_fault_has_struck() -> None:
    let_strike = threading.Event()
    striking = threading.Thread(target=let_strike.wait, daemon=True)
    found: list[int] = []

    def strike(one: Fault, _text: str, _give_back: object) -> threading.Thread:
        found.append(one.number)
        if not striking.is_alive() and not let_strike.is_set():
            striking.start()
        return striking

    injector = Injector([fault(0, "learn"), fault(1, "generate")], strike, lambda _: None)
    for text in (*START, *STEP, *STEP, *STEP):
        injector.wait_started(text)
    assert found == [1]
    let_strike.set()
    striking.join()
    for text in (*STEP, *STEP):
        injector.wait_started(text)
    assert found == [1, 0]


def test_a_phase_that_never_comes_holds_no_other_fault_up() -> None:
    waits = [text for text in (*START, *STEP, *STEP) if text not in ("scoring", "reward forward")]
    assert struck([fault(0, "score"), fault(1, "sync")], waits) == [(1, 13, "weight sync of version 1")]


def test_nothing_strikes_while_a_run_starts_or_continues() -> None:
    assert struck([fault(0, "sync")], ["weight sync of version 3", *STEP[:9]]) == []
    assert struck([fault(0, "checkpoint")], list(START)) == []


def test_faults_keep_their_distance_in_time() -> None:
    now = [0.0]
    found: list[tuple[int, float]] = []
    faults = [replace(fault(number, "learn"), apart_s=30.0) for number in range(3)]
    injector = Injector(faults, lambda one, *_: found.append((one.number, now[0])), lambda _: None, lambda: now[0])
    for _step in range(10):
        for text in STEP:
            injector.wait_started(text)
        now[0] += 11.0
    assert found == [(0, 33.0), (1, 66.0), (2, 99.0)]


def test_a_fault_that_finds_its_process_dead_comes_again() -> None:
    found: list[str] = []
    waits = [*START, *STEP, *STEP, *STEP, *STEP]
    passed: list[str] = []

    def strike(one: Fault, _text: str, give_back: Callable[[Fault], None]) -> None:
        if not found:
            give_back(one)
        found.append(f"{one.number} after {len(passed)}")

    injector = Injector([fault(0, "learn"), fault(1, "score")], strike, lambda _: None)
    for text in waits:
        injector.wait_started(text)
        passed.append(text)
    assert found == ["1 after 6", "1 after 19", "0 after 36"]


def test_every_phase_is_seen() -> None:
    seen: list[str] = []
    injector = Injector([], lambda *_: None, seen.append)
    for text in STEP:
        injector.wait_started(text)
    assert set(seen) == {"generate", "score", "log_probs", "learn", "sync", "checkpoint"}


def test_each_process_meets_each_phase_before_one_comes_again() -> None:
    options = ChaosConfig(num_faults=12, kinds=("kill", "stop", "tear"), chaos_seed=3)
    faults = draw(options, ["policy rank 0", "reward f"], ["learn", "sync"])
    cells = Counter((one.process, one.phase) for one in faults)
    assert len(cells) == 6
    assert set(cells.values()) == {2}
    assert [one.number for one in faults] == list(range(12))
    assert {one.kind for one in faults if one.process == DRIVER} == {"kill", "tear"}
    assert {one.kind for one in faults if one.process != DRIVER} == {"kill", "stop"}
    assert draw(options, ["policy rank 0", "reward f"], ["learn", "sync"]) == faults
    assert len({one.delay_s for one in faults}) == 12
    assert max(one.delay_s for one in faults) <= options.delay_s
    later = draw(options.model_copy(update={"delay_s": 30.0}), ["policy rank 0", "reward f"], ["learn", "sync"])
    assert [(one.kind, one.process, one.phase) for one in later] == [
        (one.kind, one.process, one.phase) for one in faults
    ]
    assert 3.0 < max(one.delay_s for one in later) <= 30.0
    only_stops = draw(ChaosConfig(num_faults=6, kinds=("stop",)), ["a"], ["learn"])
    assert {one.kind for one in only_stops if one.process == DRIVER} == {"kill"}, "nobody would wake a stopped driver"


def test_a_checkpoint_is_torn_only_where_an_older_one_is_there(tmp_path: Path) -> None:
    witness: dict[str, Json] = {"kind": "tear", "number": 4}
    for step in (9, 10):
        file = tmp_path / "checkpoints" / f"step_{step}" / "state.json"
        file.parent.mkdir(parents=True)
        file.write_text("x" * 10)
        told = tear(tmp_path, [witness])
        assert bool(told) is (step == 10)
    assert told == " and checkpoints/step_10/state.json cut in half"
    assert file.read_text() == "x" * 5
    assert tear(tmp_path, [witness, {"kind": "kill", "number": 5}]) == ""


def test_the_first_figure_that_differs_is_named(tmp_path: Path) -> None:
    for name, loss in (("clean", 0.5), ("chaos", 0.25)):
        (tmp_path / name).mkdir()
        rows = [{"step": 1, "policy/loss": 1.0, "time/step": loss}, {"step": 2, "policy/loss": loss}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = first_difference(tmp_path / "clean", tmp_path / "chaos")
    assert told == "first at step 2: policy/loss 0.25, not 0.5"
