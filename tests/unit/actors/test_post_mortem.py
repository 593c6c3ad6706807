"""What a look at processes finds: real ones of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from rlhf.actors import post_mortem

pytestmark = pytest.mark.timeout(30)
ENGINE = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


@pytest.fixture
def engine() -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A process that looks like an actor, and its child."""
    command = ["bash", "-c", f'exec -a ray::Rollout {sys.executable} -c "{ENGINE}"']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    yield psutil.Process(process.pid), child
    for one in (child.pid, process.pid):
        os.kill(one, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_child_of_an_engine_is_named(engine: tuple[psutil.Process, psutil.Process]) -> None:
    """A tensor-parallel engine waits for processes of its own."""
    parent, child = engine
    assert post_mortem.examine_local([(parent.pid, None)]) == {}
    child.send_signal(signal.SIGSTOP)
    until(lambda: child.status() == psutil.STATUS_STOPPED)
    found = post_mortem.examine_local([(parent.pid, None)])
    named = f"{child.pid} (sleep), which is stopped (by SIGSTOP or a debugger)"
    assert found == {parent.pid: f"waits for its child processes {named}"}
    parent.send_signal(signal.SIGSTOP)
    until(lambda: parent.status() == psutil.STATUS_STOPPED)
    assert post_mortem.examine_local([(parent.pid, None)]) == {parent.pid: "is stopped (by SIGSTOP or a debugger)"}
