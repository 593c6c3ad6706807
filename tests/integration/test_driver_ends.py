"""How a driver ends that is stopped while its run starts, or loses Ray: a line, a code, a status, no process left."""

import json
import re
import signal
import time

import pytest

from rlhf.actors.forked_worker import SERVER
from tests.integration.command_line import START_TIMEOUT_S, CommandLine, Driver, Run, read_metrics

pytestmark = pytest.mark.timeout(900)

RUN = (
    *("--policy.model", "policy", "--data.template", "plain", "--data.max-tokens", "64", "--train.batch-size", "8"),
    *("--no-log.tensorboard", "--data.path"),
)
SFT = ("sft", *RUN, "demonstrations.jsonl")


def wait_for_process(driver: Driver, name: str) -> None:
    """Wait until the run has a process whose command line contains `name`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not any(name in " ".join(process.cmdline()) for process in driver.processes()):
        assert driver.process.poll() is None, driver.log.read_text()
        assert time.monotonic() < deadline, driver.log.read_text()
        time.sleep(0.02)


def ended(driver: Driver) -> Run:
    """The run after its driver and all its processes have ended."""
    run = driver.wait(120)
    deadline = time.monotonic() + 20
    while driver.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not driver.processes()
    return run


@pytest.mark.parametrize("process", ["gcs_server", "ray::"])
def test_sigterm_while_processes_start_ends_the_run_with_a_line(command: CommandLine, process: str) -> None:
    driver = command.start(*SFT, "--train.num-steps", "50", name=f"stopped-{len(process)}")
    wait_for_process(driver, process)
    driver.process.send_signal(signal.SIGTERM)
    run = ended(driver)
    assert run.code == 75, run.output
    line = "rlhf: stopped by SIGTERM while the run starts; what was saved before is kept"
    assert run.output.splitlines()[-1] == line
    assert json.loads((run.folder / "status.json").read_text())["status"] == "preempted"


LOST = {
    "gcs_server": r"rlhf: error: ray: the control store \(gcs_server\) at \S+ has .*Continue with --resume",
    "raylet": r"rlhf: error: policy \S+: .* ray: no node of the cluster is alive: .*Continue with --resume",
}


@pytest.mark.parametrize("process", LOST)
def test_a_run_that_loses_ray_ends_with_a_line_and_its_status(process: str, command: CommandLine) -> None:
    more = ("--train.num-steps", "5000", "--checkpoint.every-steps", "1", "--checkpoint.keep", "2")
    driver = command.start(*SFT, *more, name=f"lost-{process}")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not read_metrics(driver.folder):
        assert driver.process.poll() is None, driver.log.read_text()
        assert time.monotonic() < deadline, driver.log.read_text()
        time.sleep(0.1)
    servers = [one for one in driver.processes() if str(SERVER) in one.cmdline()]
    assert [server.ppid() for server in servers if server.children()] == [driver.process.pid], "the one started ahead"
    (lost,) = (one for one in driver.processes() if one.name() == process)
    lost.kill()
    run = ended(driver)
    assert run.code == 7, run.output
    assert re.search(LOST[process], run.output), run.output
    assert "state-dump" not in run.output, "the logs of Ray's processes"
    status = json.loads((run.folder / "status.json").read_text())
    assert (status["status"], status["error"].partition(":")[0]) == ("failed", "WorkerLostError")
