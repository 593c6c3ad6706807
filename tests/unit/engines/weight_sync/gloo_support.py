"""A model, a receiver in a thread of this process, and the sender between them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from rlhf.engines.rollout.serving import ServingGate
from rlhf.engines.weight_sync.base import Info, WeightSender
from rlhf.engines.weight_sync.gloo import GlooReceiver, GlooSender
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.errors import WeightSyncError
from tests.local_engine_client import LocalEngineClient

Cleanup = list[WeightSender | LocalEngineClient]
"""What a test opened, to be closed after it."""


class Model(torch.nn.Module):
    """An embedding, three layers and a head: five buckets when they are small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.head = torch.nn.Linear(8, 50, bias=False)


@dataclass
class DictReceiver:
    """A receiver that keeps what it is given."""

    name: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    gate: ServingGate = field(init=False)
    link: GlooReceiver | None = None
    unloadable: str = ""

    def __post_init__(self) -> None:
        self.gate = ServingGate(self.name)

    def init_weight_transfer(self, init_info: Info) -> None:
        self.link = GlooReceiver(GlooInitInfo(**init_info))  # type: ignore[arg-type]

    def start_weight_update(self) -> None:
        self.gate.begin_update()

    def update_weights(self, update_info: Info) -> None:
        assert self.link is not None
        try:
            self.gate.received(self.link.receive(GlooUpdateInfo(**update_info), self.load))  # type: ignore[arg-type]
        except WeightSyncError as error:
            self.gate.fail(error)
            raise

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name == self.unloadable:
                raise KeyError(name)
            self.weights[name] = tensor.clone()

    def finish_weight_update(self, version: int, digest: str) -> str:
        return self.gate.serve(version, digest)


def open_sender(
    kind: type[GlooSender],
    model: torch.nn.Module,
    receivers: Mapping[str, DictReceiver],
    cleanup: Cleanup,
    *,
    dtype: torch.dtype = torch.float32,
    bucket_bytes: int = 400,
    timeout_s: float = 10.0,
) -> GlooSender:
    client = LocalEngineClient(receivers)
    cleanup.append(client)
    sender = kind(
        ModuleSource(model, dtype),
        client,
        master_address="127.0.0.1",
        port=0,
        num_receivers=len(receivers),
        bucket_bytes=bucket_bytes,
        timeout_s=timeout_s,
    )
    cleanup.append(sender)
    return sender
