"""Processes of vLLM that end with the one that started them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlhf.engines.weight_sync.plugin import ENDS_WITH_PARENT

pytestmark = pytest.mark.timeout(60)

SCRIPT = """
import multiprocessing, os, threading
from rlhf.engines.weight_sync.plugin import end_with_parent

def child(pipe):
    end_with_parent()
    pipe.send((os.getpid(), [thread.name for thread in threading.enumerate()]))
    threading.Event().wait()

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=child, args=(theirs,)).start()
    end_with_parent()  # this one has no parent of its kind, and goes on
    print(*ours.recv(), threading.active_count(), flush=True)
    threading.Event().wait()
"""


def started(tmp_path: Path, environment: dict[str, str]) -> tuple["subprocess.Popen[str]", psutil.Process, str]:
    """A process, its child, and what it says of both."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    pid, _, rest = process.stdout.readline().strip().partition(" ")
    return process, psutil.Process(int(pid)), rest


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_child_of_a_killed_process_ends(tmp_path: Path) -> None:
    process, child, said = started(tmp_path, {ENDS_WITH_PARENT: "1"})
    assert said == "['MainThread', 'end-with-parent'] 1"
    end(process)
    child.wait(20)


def test_other_processes_of_vllm_are_left_alone(tmp_path: Path) -> None:
    """The plugin is loaded in every process of every vLLM on the machine."""
    process, child, said = started(tmp_path, {})
    assert said == "['MainThread'] 1"
    end(process)
    child.kill()
    child.wait(20)
