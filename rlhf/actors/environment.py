"""Environment variables of the workers. Variables that the user has set are not changed."""

from collections.abc import Mapping

from rlhf.planning.placement import Placement
from rlhf.types import Role

OPENMP_SPINS = "1000"
"""How often a waiting OpenMP thread polls before it sleeps. With the library's default, a hundred times more, two roles
that compute at the same time on the same cores are up to four times slower than one after the other."""
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30)}
"""For glibc: keep freed memory, up to 2 GiB, for the next pass. Pages from the kernel have to be zeroed, which takes a
tenth of a small model's step."""
ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which a user configures the allocator."""


def model_environment(
    placement: Placement, device: str, num_cores: float, environ: Mapping[str, str], *, is_async: bool
) -> dict[str, str]:
    """The environment of every worker that holds a model, on nodes of `num_cores`.

    The number of threads depends on the role with the most ranks on a node, in every placement, so that a role computes
    the same bits on a device group of its own and on a shared one. When several groups compute at the same time, as
    with asynchronous rollouts (`is_async`), there are more threads than cores; waiting threads then sleep early.
    """
    if device == "cuda":
        return {"DS_ACCELERATOR": "cuda"}
    ranks = ranks_per_node(placement)
    widest = max(*ranks, *(group.num_engines * group.devices_per_engine for group in placement.groups))
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": num_threads(num_cores, widest, environ)}
    if len(ranks) + is_async > 1 and "GOMP_SPINCOUNT" not in environ:
        variables["GOMP_SPINCOUNT"] = OPENMP_SPINS
    return variables


def rank_environment(placement: Placement, device: str, num_cores: float, environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks that train or score have in addition."""
    if device == "cuda":
        # For an optimizer that is offloaded to the CPU: Ray would set one thread for the core of a GPU worker.
        return {"OMP_NUM_THREADS": num_threads(num_cores, max(ranks_per_node(placement)), environ)}
    is_chosen = any(name.startswith(ALLOCATOR_VARIABLES) for name in environ)
    return {} if is_chosen else dict(KEEP_FREED_MEMORY)


def ranks_per_node(placement: Placement) -> list[int]:
    """The ranks on a node of each device group with models."""
    return [group.shape.num_devices_per_node for group in placement.groups if group.roles != (Role.ROLLOUT,)]


def num_threads(num_cores: float, num_processes: int, environ: Mapping[str, str]) -> str:
    """Threads of each of `num_processes` that compute at the same time, unless the user has set them."""
    return environ.get("OMP_NUM_THREADS") or str(max(1, int(num_cores) // num_processes))
