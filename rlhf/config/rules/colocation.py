"""What --colocate means: which roles share devices, and whether rollout engines fit on devices that they share.

Pure functions, used by `rlhf check` before a run and by the placement of the run itself.
"""

from collections.abc import Sequence

ROLES = ("policy", "reference", "critic", "reward", "rollout")


def colocated_roles(flags: Sequence[str]) -> list[tuple[str, ...]]:
    """The roles of each --colocate flag as typed; `all` stands for all roles."""
    groups = [tuple(name.strip() for name in flag.split(",")) for flag in flags]
    return [ROLES if group == ("all",) else group for group in groups]


def engines_misfit(
    num_engines: int, gpus_per_engine: int, *, num_nodes: int, gpus_per_node: int, role: str
) -> tuple[str, str] | None:
    """Why engines do not fit on the devices of `role` that they share: the setting to change, and a sentence. None
    where they fit.

    Each engine needs all its GPUs on one node: on 2 nodes with 3 GPUs each there is room for 2 engines of 2 GPUs.
    """
    room = num_nodes * (gpus_per_node // gpus_per_engine)
    if num_engines <= room:
        return None
    if room == 0:
        return "rollout.tensor_parallel_size", (
            f"an engine needs {gpus_per_engine} GPUs on one node, and {role}, which shares its devices, has "
            f"{gpus_per_node} on each. Set it to at most {gpus_per_node}."
        )
    return "rollout.num_engines", (
        f"{num_engines} engines of {gpus_per_engine} GPUs do not fit on the {num_nodes} x {gpus_per_node} devices that "
        f"{role} shares with them. Set it to at most {room}, or raise {role}.num_gpus_per_node."
    )
