"""A command in a process that is forked from one that has imported what a driver imports.

These imports are the same in each run, and take two and a half seconds of a core.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import psutil

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rlhf.cli.main", "rlhf.launch.train", "rlhf.engines.models.tokenizer"])


def run_forked(
    command: Callable[[list[str]], int],
    arguments: list[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    timeout_s: float,
) -> int:
    """Run a command in `folder`, with its output in `log`. Returns its exit code. The variables of Ray in `environment`
    are the same in every call: Ray reads them when it is imported.

    Raises TimeoutError, after killing it and what it started.
    """
    process = FORKS.Process(target=_run, args=(command, arguments, folder, dict(environment), log))
    with patch.dict(os.environ, environment, clear=True):  # for the process that imports, which the first call starts
        process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        assert process.pid is not None
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in started:
            one.kill()
        raise TimeoutError(f"{' '.join(arguments)}: over {timeout_s:g} s\n{log.read_text()}")
    return process.exitcode


def _run(
    command: Callable[[list[str]], int], arguments: list[str], folder: Path, environment: dict[str, str], log: Path
) -> None:
    """Become the command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as `python -m` does
    with log.open("wb") as output, open(os.devnull, "rb") as nothing:  # noqa: PTH123
        for number, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), number)
    sys.exit(command(arguments))
