"""What the processes of a run find in their environment. What the user has set there stays as it is."""

from collections.abc import Mapping

from rlhf.planning.placement import Placement
from rlhf.types import Role

OPENMP_SPINS = "1000"
"""How often an OpenMP thread looks for its mates before it sleeps. The library's own, a hundred times more, makes two
roles that compute at once on the same cores up to four times slower than one after the other."""
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30)}
"""For glibc: what one pass frees stays for the next, up to 2 GiB. Given back to the kernel it would come again as pages
to be zeroed: a tenth of a small model's step."""
CHOOSES_MEMORY = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which a user decides on that."""


def of_all(
    placement: Placement, device: str, num_cores: float, environ: Mapping[str, str], *, runs_ahead: bool
) -> dict[str, str]:
    """For every process that holds a model, on nodes of `num_cores`.

    Cores are shared out by what works at the same time: the ranks of the widest role, wherever they live, so that a
    role computes the same bits on a group of its own and on a shared one. Groups that compute at once, as engines do
    that run ahead, thus have more threads than cores; there, threads that wait for each other soon leave theirs.
    """
    if device == "cuda":
        return {"DS_ACCELERATOR": "cuda"}
    ranks = widths(placement)
    widest = max(*ranks, *(group.num_engines * group.devices_per_engine for group in placement.groups))
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": share_of(num_cores, widest, environ)}
    if len(ranks) + runs_ahead > 1 and "GOMP_SPINCOUNT" not in environ:
        variables["GOMP_SPINCOUNT"] = OPENMP_SPINS
    return variables


def of_ranks(placement: Placement, device: str, num_cores: float, environ: Mapping[str, str]) -> dict[str, str]:
    """For ranks of models that learn or score, beside what all have."""
    if device == "cuda":
        # An optimizer on the host steps with these; Ray would allow one thread for the core that a GPU's seat books.
        return {"OMP_NUM_THREADS": share_of(num_cores, max(widths(placement)), environ)}
    is_chosen = any(name.startswith(CHOOSES_MEMORY) for name in environ)
    return {} if is_chosen else dict(KEEPS_MEMORY)


def widths(placement: Placement) -> list[int]:
    """Ranks on a node, of each group that hosts models."""
    return [group.shape.num_devices_per_node for group in placement.groups if group.roles != (Role.ROLLOUT,)]


def share_of(num_cores: float, num_processes: int, environ: Mapping[str, str]) -> str:
    """Threads of each of some processes that work at the same time, unless the user has set them."""
    return environ.get("OMP_NUM_THREADS") or str(max(1, int(num_cores) // num_processes))
