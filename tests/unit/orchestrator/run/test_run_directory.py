"""The run's folder: one driver at a time, and nobody else's folder."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config.run import LogSection
from rlhf.errors import CheckpointError, ConfigError
from rlhf.orchestrator.run.console import make_console
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.responses import StepResponses
from rlhf.orchestrator.run.run_directory import (
    RunDirectory,
    RunProcess,
    Status,
    newest_processes,
    require_unlocked,
    require_writable,
)
from rlhf.orchestrator.run.trackers import JsonLines
from tests.unit.orchestrator.support import as_sampled, given_group

RACE = """
import sys
from pathlib import Path
from rlhf.errors import CheckpointError, ConfigError
from rlhf.orchestrator.run.run_directory import RunDirectory
print("ready", flush=True)
won = []
for line in sys.stdin:
    try:
        won.append(RunDirectory.open(Path(line.strip()), resume=False))
        print("won", flush=True)
    except ConfigError as error:
        assert "in use by" in str(error), error
        print("in use", flush=True)
"""
HOLD = """
import sys, time
from pathlib import Path
from rlhf.orchestrator.run.run_directory import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]), resume=False)
print("held", flush=True)
time.sleep(60)
"""


def test_the_folder_is_private_and_laid_out(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        run.write_config("x: 1\n")
        run.note("resume", "from step 3", step=3)
        run.write_status(Status.RUNNING, step=3, num_steps=9)
        run.write_responses(3, StepResponses(trained=[as_sampled(given_group(1, ["ab", "a"], [1.0, 0.0]))]))
        assert run.read_status() is Status.RUNNING
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "config.yaml", "events.jsonl", "rollouts", "checkpoints", "tensorboard", "logs", "status.json", "lock",
        "lock_holder.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "a/rollouts/step_000003.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["ab", "a"]
    assert (tmp_path / "a/logs/attempt_1").is_dir()


def test_everything_has_its_place(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        places = (
            run.config, run.metrics, run.events, run.rollouts, run.evaluations, run.checkpoints, run.model, run.report,
            run.tensorboard, run.logs, run.log_folder, run.processes,
        )  # fmt: skip
        assert [str(place.relative_to(tmp_path / "a")) for place in places] == [
            "config.yaml", "metrics.jsonl", "events.jsonl", "rollouts", "evaluations", "checkpoints", "model",
            "report.html", "tensorboard", "logs", "logs/attempt_1", "logs/attempt_1/processes.json",
        ]  # fmt: skip


def test_a_status_says_who_wrote_it_and_one_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        assert run.read_status() is None
        run.write_status(Status.FAILED, step=3, num_steps=9, error="why")
        file = tmp_path / "a/status.json"
        status = json.loads(file.read_text())
        assert abs(time.time() - status.pop("time")) < 60
        assert status == {
            "status": "failed", "step": 3, "num_steps": 9, "error": "why", "attempt": 1, "pid": os.getpid(),
            "host": socket.gethostname(),
        }  # fmt: skip
        for text in ("", "[]", "{}", '{"status": "other"}', '{"status": []}'):
            file.write_text(text)
            assert run.read_status() is None


def test_processes_are_those_of_the_last_launch(tmp_path: Path) -> None:
    assert newest_processes(tmp_path / "a") == []
    process = RunProcess(name="policy rank 0", host="h", node_id="n", device="cpu", pid=1, stacks="policy.stacks")
    for attempt in range(1, 12):
        with RunDirectory.open(tmp_path / "a", resume=False) as run:
            assert run.attempt == attempt
            run.write_processes([replace(process, pid=attempt)])
    folder = tmp_path / "a/logs/attempt_11"
    assert newest_processes(tmp_path / "a") == [replace(process, pid=11, stacks=str(folder / "policy.stacks"))]
    (folder / "processes.json").write_text('[{"name": 1}]')
    assert newest_processes(tmp_path / "a") == []


def test_a_lock_is_seen_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "a"
    require_unlocked(path)
    assert not path.exists()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"a: in use by pid {holder.pid} on \S+ since \d{{4}}-"):
            require_unlocked(path)
        (path / "lock_holder.json").write_text("{")
        with pytest.raises(ConfigError, match=r"a: in use by another driver\. Stop it first"):
            require_unlocked(path)
        holder.kill()
    require_unlocked(path)
    RunDirectory.open(path, resume=False).close()


def test_a_folder_that_cannot_be_written_or_is_too_small_is_named(tmp_path: Path) -> None:
    require_writable(tmp_path / "a/b/c", 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=rf"run\.dir: {tmp_path} has \S+ MB free; .* need 1e\+24 MB or more"):
        require_writable(tmp_path / "a/b/c", 10**30)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"run\.dir: .*file: cannot be written \(Not a directory\)"):
        require_writable(tmp_path / "file/a", 1)


FULL = """
mount -t tmpfs -o size=64k tmpfs {folder} && exec {python} - <<'END'
from contextlib import suppress
from pathlib import Path
from rlhf.errors import CheckpointError
from rlhf.orchestrator.run.run_directory import RunDirectory, Status
with RunDirectory.open(Path("{folder}/a"), resume=False) as run:
    run.write_status(Status.RUNNING, step=3, num_steps=9)
    with suppress(OSError), open("{folder}/fill", "wb", buffering=0) as fill:
        while True:
            fill.write(bytes(512))
    with suppress(CheckpointError):
        run.note("warning", "x" * 9000)
        raise AssertionError("the disk is not full")
    run.write_status(Status.FAILED, step=4, num_steps=9, error="CheckpointError: " + "no room " * 500)
print(Path("{folder}/a/status.json").read_text())
END
"""


def test_the_end_of_a_run_is_recorded_on_a_full_disk(tmp_path: Path) -> None:
    script = FULL.format(folder=tmp_path, python=sys.executable)
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    result = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    recorded = json.loads(result.stdout)
    assert (recorded["status"], recorded["step"]) == ("failed", 4)
    assert recorded["error"].startswith("CheckpointError: no room no room")


def test_a_refused_resume_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a: no run to resume\. Leave out --resume to start it, or set it to auto"):
        RunDirectory.open(tmp_path / "a", resume=True)
    assert not (tmp_path / "a").exists()


def test_auto_resumes_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume="auto") as run:
        assert not run.resumes
        (run.checkpoints / "step_3").mkdir()
    with RunDirectory.open(tmp_path / "a", resume="auto") as run:
        assert run.resumes
    with RunDirectory.open(tmp_path / "a", resume=True) as run:
        assert run.resumes
    with pytest.raises(ConfigError, match="holds a run already"):
        RunDirectory.open(tmp_path / "a", resume=False)


@pytest.mark.timeout(60)
def test_a_second_driver_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"in use by pid {holder.pid} on \S+ since") as caught:
                RunDirectory.open(path, resume=resume)
            assert caught.value.exit_code == 2
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    RunDirectory.open(path, resume=False).close()


@pytest.mark.timeout(120)
def test_of_two_drivers_at_once_one_wins(tmp_path: Path) -> None:
    """Twenty races of two processes that start together."""
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        assert [told(racer) for racer in racers] == ["ready", "ready"]
        for race in range(20):
            for racer in racers:
                ask(racer, str(tmp_path / str(race)))
            assert sorted(told(racer) for racer in racers) == ["in use", "won"]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def ask(racer: "subprocess.Popen[str]", line: str) -> None:
    assert racer.stdin is not None
    racer.stdin.write(f"{line}\n")
    racer.stdin.flush()


def told(racer: "subprocess.Popen[str]") -> str:
    assert racer.stdout is not None
    return racer.stdout.readline().strip()


def test_a_file_system_without_locks_is_not_called_a_second_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("rlhf.orchestrator.run.run_directory.fcntl.lockf", lockf)
    with pytest.raises(CheckpointError, match=r"a: cannot be locked \(No locks available\)\. Choose a run\.dir"):
        RunDirectory.open(tmp_path / "a", resume=False)


def test_a_forked_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "a", resume=False)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False)
    try:
        run.close()
        subprocess.run([sys.executable, "-c", HOLD.replace("time.sleep(60)", ""), str(run.path)], check=True)
    finally:
        child.kill()
        child.wait(10)


def test_a_folder_of_another_program_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not an rlhf run"):
        RunDirectory.open(tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="exists and is not a folder"):
        RunDirectory.open(tmp_path / "thesis.txt", resume=True)


def test_a_run_with_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        (run.checkpoints / "step_0").mkdir()
    with pytest.raises(ConfigError, match=r"holds a run already\. Continue it with --resume"):
        RunDirectory.open(tmp_path / "a", resume=False)
    with RunDirectory.open(tmp_path / "a", resume=True) as run:
        assert run.attempt == 2


def test_a_run_that_died_while_starting_may_be_started_again(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        run.metrics.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"no run to resume\. Leave out --resume"):
        RunDirectory.open(tmp_path / "a", resume=True)
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        assert run.metrics.read_text() == ""


def test_going_back_drops_what_was_recorded_later_and_what_was_torn(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        lines = [json.dumps({"step": step, "loss": 0.5}) for step in range(1, 6)]
        run.metrics.write_text("\n".join(lines) + '\n{"step": 3, "lo')
        for step in range(1, 6):
            group = as_sampled(given_group(1, ["a"], [1.0]))
            run.write_responses(step, StepResponses(trained=[group], evaluated=[group]))
        run.rewind(3)
        assert run.metrics.read_text().splitlines() == lines[:3]
        for folder in (run.rollouts, run.evaluations):
            assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:06d}.jsonl" for step in (1, 2, 3)]


def test_a_full_disk_costs_records_and_not_the_run(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        for file in (run.events, run.metrics):
            file.symlink_to("/dev/full")
        out = io.StringIO()
        records = Records(run, lambda: [JsonLines(run.metrics)], make_console(3, out), LogSection(), num_steps=3)
        with records.open():
            records.step(1, {"loss": 0.5}, StepResponses())
            records.warn("a tie")
        assert json.loads((run.path / "status.json").read_text())["step"] == 1
    told = out.getvalue()
    assert "metrics.jsonl: cannot be written (No space left on device); the run goes on without this record" in told
    assert "events.jsonl: cannot be written" in told
    assert "a tie" in told


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        run.events.symlink_to("/dev/full")
        with pytest.raises(CheckpointError, match=r"events\.jsonl: cannot be written \(No space left on device\)"):
            run.note("resume", "from step 3")


@pytest.mark.parametrize("resume", [False, True])
def test_a_trial_export_of_a_killed_launch_is_removed(tmp_path: Path, resume: bool) -> None:
    with RunDirectory.open(tmp_path / "a", resume=False):
        (tmp_path / "a/trial-x").mkdir()
        (tmp_path / "a/trial-x/model.safetensors").write_bytes(b"large")
        if resume:
            (tmp_path / "a/checkpoints/step_1").mkdir()
    with RunDirectory.open(tmp_path / "a", resume=resume):
        assert not (tmp_path / "a/trial-x").exists()
