"""What every remote process of ours can do: say where it is, what it holds and what it listens on."""

import contextlib
import os
from pathlib import Path

import ray

from rlhf.actors.logs import Trace, redirect_output
from rlhf.actors.ports import listening
from rlhf.actors.post_mortem import leave_stacks
from rlhf.engines.process.process_memory import peak_memory


def here() -> tuple[str, int, str]:
    """This process: the node's address, the process id, and the node's name in Ray."""
    return node_address(), os.getpid(), ray.get_runtime_context().get_node_id()


def node_address() -> str:
    """This node's address in the cluster. Ray's function of that name guesses the one that leads to the world."""
    own = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == own)


class Actor:
    """What every actor of a run can do."""

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        """`folder` is the driver's, from which relative paths lead."""
        # A node that does not see it stays where Ray put the process: in its copy of a job's files.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        if log_file is not None:
            redirect_output(log_file)
            leave_stacks(log_file)
        self._trace = Trace(log_file.with_suffix(".trace.jsonl") if log_file is not None else None)

    def where(self) -> tuple[str, int, str]:
        return here()

    def reset(self) -> None:
        """Answer where nothing stands in the way of other questions by other processes."""

    def gpus(self) -> list[str]:
        """The GPUs that are this process's, as its node calls them."""
        return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])

    def peak_memory(self) -> int:
        return peak_memory()

    def listening(self) -> list[tuple[str, int]]:
        return listening()
