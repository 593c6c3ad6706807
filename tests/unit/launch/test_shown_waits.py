"""What is shown of the workers that a driver waits for."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.actors.calls import Worker
from rlhf.engines.rollout.spec import STAGE
from rlhf.launch.shown_waits import ShownWaits
from rlhf.orchestrator.run.waits import no_stage


def test_workers_and_the_stage_of_an_engine(tmp_path: Path) -> None:
    told: list[tuple[str, list[str], list[str]]] = []

    def waiting(what: str, who: Sequence[str], stage_of: Callable[[str], str] = no_stage) -> None:
        told.append((what, list(who), [stage_of(name) for name in who]))

    log = tmp_path / "rollout_engine_0.log"
    log.write_text(f"x\n2026 INFO rlhf: {STAGE}importing vLLM\n")
    shown = ShownWaits(waiting, tmp_path)
    engine = Worker(handle=None, name="rollout engine 0", node="?", node_id="?", pid=0, stacks=None)
    policy = Worker(handle=None, name="policy rank 0", node="?", node_id="?", pid=0, stacks=None)
    shown.workers_awaited("loading of models", [policy, engine])
    with log.open("a") as lines:
        lines.write("y" * 2000 + f"\n2026 INFO rlhf: {STAGE}loading the model\nz\n")
    shown.workers_awaited("loading of models", [engine])
    shown.workers_awaited("loading of models", [])
    assert told == [
        ("loading of models", ["policy rank 0", "rollout engine 0"], ["", "importing vLLM"]),
        ("loading of models", ["rollout engine 0"], ["loading the model"]),
        ("loading of models", [], []),
    ]
