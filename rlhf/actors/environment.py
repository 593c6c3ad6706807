"""Environment variables of the workers. Variables that the user has set are not changed."""

from collections.abc import Mapping, MutableMapping

from rlhf.planning.placement import Placement
from rlhf.types import Role

OPENMP_SPINS = "1000"
"""How often a waiting OpenMP thread polls before it sleeps. Alone on its cores a program is as fast as with the
library's default of a hundred times more. Beside another program on two cores, small multiplications take 2.6 times as
long as alone, with the default a hundred times: a thread that polls takes the core of one that it waits for."""
CUDA_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's variables for the allocator of GPU memory: today's name, and the old one."""
EXPANDABLE_SEGMENTS = "expandable_segments"


def model_environment(
    placement: Placement, device: str, num_cores: float, environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of every worker, on nodes of `num_cores`.

    The number of threads depends on the role with the most ranks on a node, in every placement, so that a role computes
    the same bits on a device group of its own and on a shared one. There may be more threads than cores: of groups that
    compute at the same time, and of other programs. Waiting threads sleep early.
    """
    if device == "cuda":
        return {"DS_ACCELERATOR": "cuda"}
    ranks = ranks_per_node(placement)
    widest = max(*ranks, *(group.num_engines * group.devices_per_engine for group in placement.groups))
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": num_threads(num_cores, widest, environ)}
    if "GOMP_SPINCOUNT" not in environ:
        variables["GOMP_SPINCOUNT"] = OPENMP_SPINS
    return variables


def rank_environment(placement: Placement, device: str, num_cores: float, environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks that train or score have in addition: on CPUs nothing, so that one fork server serves all workers."""
    if device == "cpu":
        return {}
    # For an optimizer that is offloaded to the CPU: Ray would set one thread for the core of a GPU worker.
    variables = {"OMP_NUM_THREADS": num_threads(num_cores, max(ranks_per_node(placement)), environ)}
    # Micro-batches of varying size leave holes in segments of fixed size. Such memory has no CUDA IPC handle, which
    # engines on the same GPUs need.
    is_shared = any(group.is_shared_by_engines for group in placement.groups)
    if not is_shared and not any(name in environ for name in CUDA_ALLOCATOR):
        variables["PYTORCH_CUDA_ALLOC_CONF"] = f"{EXPANDABLE_SEGMENTS}:True"
    return variables


def drop_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Take expandable segments out of the settings of torch's allocator, and leave the others. A rollout engine with
    tensor parallelism shares its buffers through CUDA IPC handles, which memory of such segments does not have."""
    for name in CUDA_ALLOCATOR:
        settings = environ.get(name, "").split(",")
        kept = [setting for setting in settings if setting.partition(":")[0].strip() != EXPANDABLE_SEGMENTS]
        if kept == settings:
            continue
        if kept:
            environ[name] = ",".join(kept)
        else:
            del environ[name]


def ranks_per_node(placement: Placement) -> list[int]:
    """The ranks on a node of each device group with models."""
    return [group.shape.num_devices_per_node for group in placement.groups if group.roles != (Role.ROLLOUT,)]


def num_threads(num_cores: float, num_processes: int, environ: Mapping[str, str]) -> str:
    """Threads of each of `num_processes` that compute at the same time, unless the user has set them."""
    return environ.get("OMP_NUM_THREADS") or str(max(1, int(num_cores) // num_processes))
