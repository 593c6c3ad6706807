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
    num_engines: int, gpus_per_engine: int, *, nodes_per_engine: int, num_nodes: int, gpus_per_node: int, role: str
) -> tuple[str, str] | None:
    """Why engines do not fit on the devices of `role` that they share: the setting to change, and a sentence. None
    where they fit.

    Each engine needs equally many GPUs on each of its nodes: on 2 nodes with 3 GPUs each there is room for 2 engines of
    2 GPUs on one node, and for 3 engines of 2 GPUs on two.
    """
    each = max(1, gpus_per_engine // nodes_per_engine)
    room = num_nodes // nodes_per_engine * (gpus_per_node // each)
    if num_engines <= room:
        return None
    if num_nodes < nodes_per_engine:
        return "rollout.num_nodes_per_engine", (
            f"an engine has {nodes_per_engine} nodes, and {role}, which shares its devices, has {num_nodes}. "
            f"Set it to at most {num_nodes}, or raise {role}.num_nodes."
        )
    if room == 0:
        where = "one node" if nodes_per_engine == 1 else f"each of {nodes_per_engine} nodes"
        return "rollout.tensor_parallel_size", (
            f"an engine needs {each} GPUs on {where}, and {role}, which shares its devices, has "
            f"{gpus_per_node} on each. Give an engine at most {gpus_per_node * nodes_per_engine} "
            "(tensor_parallel_size * pipeline_parallel_size), or raise rollout.num_nodes_per_engine."
        )
    return "rollout.num_engines", (
        f"{num_engines} engines of {gpus_per_engine} GPUs do not fit on the {num_nodes} x {gpus_per_node} devices that "
        f"{role} shares with them. Set it to at most {room}, or raise {role}.num_gpus_per_node."
    )
