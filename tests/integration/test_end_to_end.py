"""Whole PPO runs through the command line, on real Ray, DeepSpeed and vLLM: the same run whichever way it is cut.

Each start takes tens of seconds, so runs are shared: a straight one in each placement, one that is killed and one that
is asked to stop. All have 6 steps and a checkpoint every 3.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.run_directory import newest_processes
from rlhf.types import Json
from tests.integration.command_line import (
    CommandLine,
    Run,
    all_listening,
    clean_environment,
    listening_sockets,
    shared_memory,
)
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(1500)

TRANSFORMERS = ("ppo", "ppo.yaml", "--rollout.engine", "transformers")
TOGETHER = (*TRANSFORMERS, "--colocate", "all")
VLLM = ("ppo", "ppo.yaml", "--rollout.engine", "vllm", "--colocate", "all")
SCORING_STEP_5 = 6
"""The call of the reward function in the middle of step 5 of a fresh run: call 1 is the probe."""
AFTER_KILL_S = 30.0
REPLACED = ("reference rank 0", "reward rank 0", "rollout engine 0")
PLANTED = "planted-5a1f-secret"
ROLES = {"ray::Policy", "ray::Critic", "ray::Reference", "ray::Reward", "ray::Rollout"}


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A driver that was killed in the middle of step 5."""

    folder: Path
    second_driver: Run
    """Of a driver that was started on the same folder before."""
    num_processes: int
    sockets: list[str]
    """What its processes listened on."""
    checkpoints: set[str]
    steps_recorded: list[float]
    left_processes: list[str]
    """What was still there 30 s later."""
    left_sockets: list[str]
    left_shared_memory: list[Path]


@dataclass(frozen=True, kw_only=True)
class Chaos(Run):
    """A run under faults."""

    witnesses: list[dict[str, Json]]


def joined(head: RayHead, arguments: tuple[str, ...]) -> tuple[str, ...]:
    return (*arguments, "--cluster.address", head.address)


def assert_same_run(run: Run, other: Run) -> None:
    """The same weights, to the byte, and the same figures on the way."""
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6]
    assert run.figures == other.figures
    assert run.weights == other.weights
    for role in ("policy", "critic"):
        assert_same_tensors(run.optimizer_states(role), other.optimizer_states(role))


def assert_same_tensors(state: object, other: object) -> None:
    """Equal trees of tensors, bit for bit."""
    if isinstance(state, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(state, other)
    elif isinstance(state, Mapping):
        assert isinstance(other, Mapping)
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert_same_tensors(value, other[key])
    elif isinstance(state, list | tuple):
        assert isinstance(other, list | tuple)
        for value, its in zip(state, other, strict=True):
            assert_same_tensors(value, its)


@pytest.fixture(scope="module")
def separate_titles() -> set[str]:
    """How the process list called the actors of the separate run; filled while it runs."""
    return set()


@pytest.fixture(scope="module")
def separate(command: CommandLine, separate_titles: set[str]) -> Run:
    """Every role in processes of its own, on a cluster that the run starts itself. Those of the engine and of the
    models that only compute are killed in the middle of step 5."""
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "REWARD_TOKEN"), PLANTED)
    environment = {**clean_environment(), **secrets}
    driver = command.start(*TRANSFORMERS, name="separate", hold_at=SCORING_STEP_5, environment=environment)
    driver.wait_until_held()
    separate_titles |= {process.cmdline()[0].strip() for process in driver.processes() if process.cmdline()}
    for process in newest_processes(driver.folder):
        if process.name in REPLACED:
            os.kill(process.pid, signal.SIGKILL)
    driver.release()
    return driver.wait()


@pytest.fixture(scope="module")
def merged_pairs(command: CommandLine, head: RayHead) -> Run:
    pairs = ("--colocate", "policy,reference", "--colocate", "critic,reward")
    return command.run(*joined(head, (*TRANSFORMERS, *pairs)), name="pairs", environment=head.environment)


@pytest.fixture(scope="module")
def together(command: CommandLine, head: RayHead) -> Run:
    return command.run(*joined(head, TOGETHER), name="together", environment=head.environment)


@pytest.fixture(scope="module")
def killed(command: CommandLine) -> Killed:
    driver = command.start(*TOGETHER, name="killed", hold_at=SCORING_STEP_5)
    driver.wait_until_held()
    second = command.start(*TOGETHER, name="killed").wait()
    processes = driver.processes()
    sockets, files = listening_sockets(processes), shared_memory(processes)
    driver.process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + AFTER_KILL_S
    while (driver.processes() or sockets.keys() & dict(all_listening())) and time.monotonic() < deadline:
        time.sleep(0.5)  # a process of many threads may be a zombie while one of them still closes what was open
    left = driver.processes()
    driver.release()
    listening = dict(all_listening())
    return Killed(
        folder=driver.folder,
        second_driver=second,
        num_processes=len(processes),
        sockets=list(sockets.values()),
        checkpoints={path.name for path in (driver.folder / "checkpoints").iterdir()},
        steps_recorded=[row["step"] for row in driver.wait().metrics],
        left_processes=[f"{process.pid} {process.name()}" for process in left],
        left_sockets=[where for inode, where in sockets.items() if inode in listening],
        left_shared_memory=[path for path in files if path.exists()],
    )


@pytest.fixture(scope="module")
def straight_vllm(command: CommandLine, head: RayHead) -> Run:
    return command.run(*joined(head, VLLM), name="straight_vllm", environment=head.environment)


@pytest.fixture(scope="module")
def stopped(command: CommandLine, head: RayHead) -> Run:
    """A run with vLLM that got SIGTERM in the middle of step 5."""
    driver = command.start(*joined(head, VLLM), name="stopped", hold_at=SCORING_STEP_5, environment=head.environment)
    driver.wait_until_held()
    driver.process.send_signal(signal.SIGTERM)
    run = driver.wait()
    driver.release()
    return run


@pytest.fixture(scope="module")
def continued_vllm(command: CommandLine, head: RayHead, stopped: Run) -> Run:
    return command.run(*joined(head, VLLM), "--resume", name="stopped", environment=head.environment)


def test_a_run_ends_with_a_model_that_loads(separate: Run) -> None:
    assert separate.code == 0, separate.output
    assert "step 6/6" in separate.output
    assert f'AutoModelForCausalLM.from_pretrained("{separate.model}")' in separate.output
    model = AutoModelForCausalLM.from_pretrained(separate.model)
    untrained = AutoModelForCausalLM.from_pretrained(separate.folder.parent.parent / "policy")
    assert not torch.equal(model.lm_head.weight, untrained.lm_head.weight)
    assert "eval/reward" in separate.metrics[-1]


def test_processes_that_only_compute_are_replaced_without_a_restart(separate: Run) -> None:
    """Nothing else of this run differs from the others, as the tests of placements show."""
    events = read_rows(separate.folder / "events.jsonl")
    texts = [str(event["text"]) for event in events if event["kind"] == "replacement"]
    assert len(texts) == len(REPLACED), separate.output
    assert all(any(f"{name} (node" in text and " died." in text for text in texts) for name in REPLACED)
    assert not [event for event in events if event["kind"] == "restart"]


def test_actors_are_seen_by_role_in_the_process_list(separate: Run, separate_titles: set[str]) -> None:
    titles = {title.split(".")[0] for title in separate_titles if title.startswith("ray::")}
    assert titles >= ROLES


def test_no_secret_of_the_environment_is_written_down(separate: Run) -> None:
    files = [path for path in separate.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [str(path) for path in files if PLANTED.encode() in path.read_bytes()] == []
    assert PLANTED not in separate.output


def test_placements_compute_the_same_run(separate: Run, merged_pairs: Run, together: Run) -> None:
    assert_same_run(merged_pairs, separate)
    assert_same_run(together, separate)


def test_sharing_processes_takes_no_more_memory(separate: Run, together: Run) -> None:
    held = [
        sum(gib for name, gib in run.metrics[-1].items() if name.startswith("memory/")) for run in (separate, together)
    ]
    assert 0 < held[1] <= held[0], f"all processes: separate {held[0]:.2f} GiB, together {held[1]:.2f} GiB"


def test_a_second_driver_is_refused(killed: Killed) -> None:
    assert killed.second_driver.code == 2
    assert "runs/killed: in use by pid" in killed.second_driver.output
    assert "Traceback" not in killed.second_driver.output


def test_a_killed_driver_leaves_nothing(killed: Killed) -> None:
    assert killed.num_processes > 8, "the processes of Ray and the actors were not found"
    assert len(killed.sockets) > 5
    assert killed.left_processes == []
    assert killed.left_sockets == []
    assert killed.left_shared_memory == []


def test_a_run_on_a_cluster_of_its_own_listens_on_loopback_only(killed: Killed) -> None:
    assert [where for where in killed.sockets if " on 127.0.0.1:" not in where] == []


def test_a_run_says_who_can_be_reached(separate: Run) -> None:
    assert "all listen on loopback only" in separate.output


def test_a_killed_run_has_what_it_had_done(killed: Killed) -> None:
    assert killed.checkpoints >= {"step_3"}
    assert killed.steps_recorded == [1, 2, 3, 4]


def test_sigterm_saves_and_asks_to_be_continued(stopped: Run) -> None:
    assert stopped.code == 75, stopped.output
    assert "step 4 is saved; continue with --resume" in stopped.output
    assert "Traceback" not in stopped.output
    assert (stopped.folder / "checkpoints" / "step_4" / "manifest.json").exists()


def test_a_stopped_vllm_run_goes_on_as_if_nothing_had_happened(continued_vllm: Run, straight_vllm: Run) -> None:
    assert "continuing after step 4" in continued_vllm.output
    assert_same_run(continued_vllm, straight_vllm)


def test_a_cluster_gets_everything_back(head: RayHead, chaos: Chaos, continued_vllm: Run) -> None:
    """Also from drivers that were killed."""
    actors = [
        process
        for process in psutil.Process(head.process.pid).children(recursive=True)
        if process.name().split(".")[0] in ROLES
    ]
    _, alive = psutil.wait_procs(actors, timeout=30)
    assert not alive


def test_a_run_that_is_there_is_not_started_again(command: CommandLine, separate: Run, together: Run) -> None:
    drivers = [
        command.start(*TRANSFORMERS, name="together"),
        command.start(*TRANSFORMERS, "--resume", name="separate"),
        command.start(*TRANSFORMERS, "--resume", name="never_started"),
        command.start(*TRANSFORMERS, "--cluster.address", "127.0.0.1:1", name="unjoined"),
    ]
    refusals = [driver.wait() for driver in drivers]
    assert [run.code for run in refusals] == [2, 2, 2, 2]
    assert "runs/together: holds a run already. Continue it with --resume" in refusals[0].output
    assert "step 6 is done, and train.num_steps is 6: nothing is left to do" in refusals[1].output
    assert "runs/never_started: no run to resume" in refusals[2].output
    assert "no cluster at 127.0.0.1:1" in refusals[3].output
    status = json.loads((refusals[3].folder / "status.json").read_text())
    assert status["status"] == "failed"
    assert "no cluster at 127.0.0.1:1" in status["error"]
    assert len(together.metrics) == len(separate.metrics) == 6


def test_auto_leaves_a_finished_run_as_it_is(command: CommandLine, separate: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in (separate.folder / "model").rglob("*")}
    again = command.start(*TRANSFORMERS, "--resume", "auto", name="separate").wait()
    assert again.code == 0
    assert "step 6 is done and the model exported: nothing is left to do" in again.output
    assert before == {path: path.stat().st_mtime_ns for path in (separate.folder / "model").rglob("*")}


@pytest.fixture(scope="module")
def chaos(command: CommandLine, head: RayHead, separate: Run) -> Chaos:
    """The run in groups of their own once more, with its processes killed and stopped."""
    deadlines = ("--train.step_timeout_s", "25", "--rollout.generate_timeout_s", "25", "--rollout.sync_timeout_s", "20")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlhf.cli.main", "chaos", *joined(head, TRANSFORMERS), *deadlines),
            *("--run.name", "separate", "--against", str(separate.folder)),
            # The engine answers within 30 ms: a fault that comes later is met by the next question.
            # A fault a step, each in a process and a phase of its own; the run's six steps have room for five.
            *("--num-faults", "5", "--kinds", "kill,stop", "--chaos-seed", "752131", "--delay-s", "0"),
        ],
        cwd=command.workplace,
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Chaos(
        folder=command.workplace / "runs" / "separate-chaos",
        code=done.returncode,
        output=done.stdout + done.stderr,
        witnesses=read_rows(command.workplace / "runs" / "separate-chaos-faults" / "witness.jsonl"),
    )


def test_a_run_under_faults_is_the_run_in_peace(chaos: Chaos, separate: Run) -> None:
    assert chaos.code == 0, chaos.output
    assert "both learned the same weights, to the byte" in chaos.output
    assert chaos.figures == separate.figures
    assert chaos.weights == separate.weights


def test_every_fault_struck(chaos: Chaos) -> None:
    assert len(chaos.witnesses) == 5, chaos.output
    assert {row["kind"] for row in chaos.witnesses} == {"kill", "stop"}
    assert {row["process"] for row in chaos.witnesses} == {
        *("policy rank 0", "critic rank 0", "reward rank 0", "reward function", "rollout engine 0")
    }
    assert {row["phase"] for row in chaos.witnesses} == {
        "generate",
        "score",
        "log_probs",
        "learn",
        "checkpoint",
    }


def test_what_holds_no_state_is_replaced_in_its_step(chaos: Chaos) -> None:
    texts = [str(row["text"]) for row in read_rows(chaos.folder / "events.jsonl") if row["kind"] == "replacement"]
    for name in ("reward function", "reward rank 0"):
        assert [text for text in texts if f"{name} (" in text.partition(" died. ")[0]], (name, texts)


def test_what_lost_nothing_does_not_start_again(chaos: Chaos) -> None:
    """And a restart says who was lost: a rank of a model that learns."""
    texts = [str(row["text"]) for row in read_rows(chaos.folder / "events.jsonl") if row["kind"] == "restart"]
    for name in ("policy rank 0", "critic rank 0"):
        (text,) = [text for text in texts if f"{name} (" in text and " died. " in text]
        spared = set(text.partition("All but ")[2].partition(" start again")[0].split(", "))
        assert {"reference rank 0", "reward function", "reward rank 0"} <= spared
