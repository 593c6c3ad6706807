"""A killed driver takes along what it started, even what the kernel would leave."""

import contextlib
import subprocess
import sys

import psutil
import pytest

from rlhf.actors.orphans import OrphanWatch

DRIVER = """
import subprocess, sys, time
from rlhf.actors.orphans import OrphanWatch

before = subprocess.Popen(["sleep", "600"])
watch = OrphanWatch()
with watch:
    shell = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    sleeper = shell.stdout.readline().strip()
print(before.pid, shell.pid, sleeper, flush=True)
{end}
time.sleep(600)
"""


def start_driver(end: str) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    """A driver and what it started: a process before the watch, a child inside it, and the child's child."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(end=end)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    with driver.stdout:
        return driver, [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", ["", "watch.close()", "sys.exit()"])
def test_what_the_driver_started_ends_with_it(end: str) -> None:
    driver, (before, child, grandchild) = start_driver(end)
    try:
        if end == "":
            assert grandchild.is_running()
            driver.kill()
        gone, _ = psutil.wait_procs([grandchild], timeout=30)
        assert gone == [grandchild]
        assert before.is_running()
    finally:
        driver.kill()
        driver.wait(30)
        for process in (before, child, grandchild):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_where_nothing_was_started_nobody_watches() -> None:
    before = set(psutil.Process().children())
    watch = OrphanWatch()
    with watch:
        pass
    assert set(psutil.Process().children()) == before
    watch.close()
