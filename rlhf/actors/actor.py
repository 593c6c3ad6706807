"""The base class of all workers: location, GPUs, memory, open ports, logs."""

import contextlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path

import ray

from rlhf.actors.logs import Trace, redirect_output
from rlhf.actors.portable_errors import with_portable_errors, with_portable_errors_async
from rlhf.actors.ports import listening
from rlhf.actors.post_mortem import write_stacks_on_signal
from rlhf.engines.process.process_memory import peak_memory


def process_location() -> tuple[str, int, str]:
    """This process: its node's address, its process id, and its node's id in Ray."""
    return node_address(), os.getpid(), ray.get_runtime_context().get_node_id()


def node_address() -> str:
    """This node's address in the cluster. Ray's function of that name may return the address of another network."""
    own = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == own)


class Actor:
    """The base class of all workers of a run. Their methods raise errors that can be sent to the driver."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, method in vars(cls).copy().items():
            if inspect.isfunction(method) and not name.startswith("_"):
                is_async = inspect.iscoroutinefunction(method)
                setattr(cls, name, (with_portable_errors_async if is_async else with_portable_errors)(method))

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        """`folder` is the driver's working directory, which relative paths start from."""
        # Where a node does not have it, the process stays in Ray's copy of the job's files.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        if log_file is not None:
            redirect_output(log_file)
            write_stacks_on_signal(log_file)
        self._trace = Trace(log_file.with_suffix(".trace.jsonl") if log_file is not None else None)

    def location(self) -> tuple[str, int, str]:
        return process_location()

    def reset(self) -> None:
        """End what is left of earlier calls, so that another attempt can use this worker."""

    def gpus(self) -> list[str]:
        """The GPUs that Ray assigned to this process, by their ids on the node."""
        return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])

    def see_gpus(self, gpus: Sequence[str]) -> None:
        """Make CUDA see `gpus` alone, as devices 0 and up. Called before CUDA is initialized.

        Ray does so only where RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is not set; with it every rank of a node
        would compute on GPU 0.
        """
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    def peak_memory(self) -> int:
        return peak_memory()

    def listening(self) -> list[tuple[str, int]]:
        return listening()
