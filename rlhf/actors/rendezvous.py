"""Workers that others can meet at: of a process group, or of an engine that is spread over nodes."""

# ruff: noqa: PLC0415

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.actors.actor import Actor, node_address

if TYPE_CHECKING:
    import socket


class RendezvousActor(Actor):
    """A worker that can listen for others."""

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._listener: socket.socket | None = None

    def open_rendezvous(self) -> tuple[str, int]:
        """Listen for the others on this node's address. Returns address and port."""
        from rlhf.engines.process.rendezvous import open_listener

        self._listener = open_listener(node_address())
        address, port = self._listener.getsockname()[:2]
        return str(address), int(port)
