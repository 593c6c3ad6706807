"""Data sheets of devices, and clusters written as `16x8xH100`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.errors import ConfigError

GIB = 2**30
GB = 10**9
TERA = 10**12
LEAST_SHARED_MEMORY_GIB = 1.0
"""Free space in /dev/shm for Ray's objects. A container's default is much less."""
CLUSTER = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<devices>\d+)x(?P<kind>[A-Za-z][\w-]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSheet:
    """One device, and its share of its node. Rates are dense peaks in one direction, in SI units."""

    name: str
    memory_gib: float
    """Memory available to a program."""
    tflops: float
    """Peak of the matrix units, in bfloat16 (float32 on CPU)."""
    memory_gb_s: float
    link_gb_s: float
    """To another device of the same node."""
    network_gb_s: float
    """To another node."""
    host_gib: float
    """Host memory of a node, divided by its devices."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "CPU"


def _gpu(
    name: str, memory_gib: float, tflops: float, memory: float, link: float, network: float, host_gib: float
) -> DeviceSheet:
    return DeviceSheet(
        name=name,
        memory_gib=memory_gib,
        tflops=tflops,
        memory_gb_s=memory,
        link_gb_s=link,
        network_gb_s=network,
        host_gib=host_gib,
    )


SHEETS: Mapping[str, DeviceSheet] = {
    sheet.name: sheet
    for sheet in (
        _gpu("B200", 178.0, 2250, 8000, 900, 50, 256),
        _gpu("H200", 140.0, 989, 4800, 450, 50, 256),
        _gpu("H100", 79.6, 989, 3350, 450, 50, 256),
        _gpu("A100", 79.2, 312, 2039, 300, 25, 128),
        _gpu("A100-40", 39.4, 312, 1555, 300, 25, 128),
        _gpu("L40S", 44.5, 362, 864, 32, 12.5, 96),
        _gpu("A10G", 22.3, 70, 600, 32, 12.5, 48),
        _gpu("L4", 22.2, 121, 300, 32, 12.5, 48),
        _gpu("RTX4090", 23.5, 165, 1008, 32, 1.25, 64),
        _gpu("CPU", 8.0, 0.1, 10, 4, 1.25, 8),
    )
}
"""Data sheets of the SXM parts if there are some. The network is that of the makers' servers: one port for each
device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """Equal nodes with equal devices."""

    num_nodes: int
    devices_per_node: int
    device: DeviceSheet

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def capacity_gib(self) -> float:
        """Memory that one process may use: its device's, or without GPUs the node's, which all processes share."""
        return self.device.memory_gib * (self.devices_per_node if self.device.is_cpu else 1)

    @property
    def host_gib_per_node(self) -> float:
        return self.device.host_gib * self.devices_per_node

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.devices_per_node}x{self.device.name}"


def parse_cluster(text: str) -> ClusterShape:
    """`16x8xH100` is 16 nodes of 8 devices, `8xH100` is one node.

    Raises:
        ConfigError: the text has another form, or names a device without a sheet.
    """
    match = CLUSTER.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f'cluster: need NODESxDEVICESxKIND, as 16x8xH100, or DEVICESxKIND, as 8xH100 (got "{text}").')
    kind, nodes, devices = match["kind"].upper(), int(match["nodes"] or 1), int(match["devices"])
    if kind not in SHEETS:
        raise ConfigError(f'cluster: no data sheet of "{match["kind"]}" (have {", ".join(SHEETS)}).')
    if nodes < 1 or devices < 1:
        raise ConfigError(f'cluster: need at least one node and one device (got "{text}").')
    return ClusterShape(num_nodes=nodes, devices_per_node=devices, device=SHEETS[kind])
