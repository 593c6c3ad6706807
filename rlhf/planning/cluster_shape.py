"""The shape of a cluster whose GPUs are known by name, or of this machine."""

import os
from collections.abc import Sequence
from dataclasses import replace

import psutil

from rlhf.errors import ConfigError
from rlhf.planning.hardware import GIB, SHEETS, ClusterShape, DeviceSheet
from rlhf.planning.placement import Placement

CORE_TFLOPS = 0.16
"""float32, of one core of a server's CPU with AVX-512."""


def shape_of(nodes: Sequence[Sequence[str]], placement: Placement) -> ClusterShape:
    """The cluster whose nodes have GPUs of these kinds. Without GPUs, the devices of a run share this machine's cores
    and memory.

    Raises:
        ConfigError: the GPUs are of a kind without a data sheet, or of several kinds.
    """
    kinds = sorted({kind for node in nodes for kind in node})
    if not kinds:
        return _cpu_cluster(placement)
    if len(kinds) > 1:
        raise ConfigError(f"cluster: has {', '.join(kinds)}; plan for one kind of them, as --cluster 4x8xH100.")
    fewest = min(len(node) for node in nodes if node)
    return ClusterShape(num_nodes=sum(bool(n) for n in nodes), devices_per_node=fewest, device=sheet_of(kinds[0]))


def sheet_of(name: str) -> DeviceSheet:
    """The data sheet of a device by the name that its driver or Ray gives it. Raises ConfigError."""
    plain = name.upper().replace(" ", "").replace("-", "").replace("_", "")
    if "A100" in plain and "40G" in plain:
        return SHEETS["A100-40"]
    for kind, sheet in SHEETS.items():
        if kind.replace("-", "") in plain and not sheet.is_cpu:
            return sheet
    raise ConfigError(f'cluster: no data sheet of "{name}". Plan for one of {", ".join(SHEETS)} with --cluster.')


def _cpu_cluster(placement: Placement) -> ClusterShape:
    """All devices share the memory. Roles compute one after the other, and the ranks of one role share the cores."""
    memory = psutil.virtual_memory().total / GIB / placement.num_devices
    widest = max(max(group.shape.num_devices, group.num_engines) for group in placement.groups)
    tflops = CORE_TFLOPS * max(1.0, (os.cpu_count() or 1) / widest)
    sheet = replace(SHEETS["CPU"], memory_gib=memory, tflops=tflops, host_gib=memory)
    return ClusterShape(num_nodes=1, devices_per_node=placement.num_devices, device=sheet)
