"""A fork server for a run's own cluster, which imports while the run reads its data and Ray starts.

Its environment is a forecast of the one that workers will have. Where that is wrong the first worker starts another
server (`forked_worker.py`): a wrong forecast costs time and changes nothing else.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rlhf.actors.connection import local_cpus
from rlhf.actors.environment import model_environment
from rlhf.actors.forked_worker import FOLDER, server_name, start_server
from rlhf.algorithms.needs import needs_of
from rlhf.config.commands import TrainConfig
from rlhf.config.run import ClusterSection
from rlhf.errors import ConfigError
from rlhf.launch.local_gpus import local_gpus
from rlhf.planning.placement import Placement
from rlhf.planning.roles import place


@contextmanager
def forking_ahead(config: TrainConfig) -> Iterator[None]:
    """Inside, workers of a cluster that is started here are forked from a server that is started now."""
    with ExitStack() as stack:
        with suppress(ConfigError):  # which the run will say
            if starts_cpu_cluster(config.cluster):
                stack.enter_context(serving_forks(place(config, needs_of(config.algo))))
        yield


def starts_cpu_cluster(section: ClusterSection) -> bool:
    """Whether a run will start a cluster of its own whose workers are forked."""
    joins = section.address or os.environ.get("RAY_ADDRESS")
    is_cpu = section.device == "cpu" or (section.device == "auto" and not local_gpus())
    return section.fork_workers and sys.platform == "linux" and is_cpu and not joins


@contextmanager
def serving_forks(placement: Placement) -> Iterator[None]:
    """Inside, a server runs for the workers of a cluster that this process starts."""
    with TemporaryDirectory(prefix="rlhf-fork-") as folder:
        os.environ[FOLDER] = folder
        environ = worker_environment(placement, os.environ)
        log = Path(folder, "server.log")
        server = start_server(Path(folder, server_name(environ)), log, parent=os.getpid(), environ=environ)
        try:
            yield
        finally:
            del os.environ[FOLDER]
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)


def worker_environment(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """A forecast of the variables of a worker in a cluster that a process with the variables `environ` starts."""
    return {**environ} | model_environment(placement, "cpu", local_cpus(), environ)
