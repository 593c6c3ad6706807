"""The sender of each trainer rank, and the engines that it sends to."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlhf.engines.weight_sync.base import Info, WeightSender
from rlhf.engines.weight_sync.gloo import GatherOnlySender, GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.engines.weight_sync.senders import make_sender
from rlhf.errors import ConfigError
from tests.local_engine_client import LocalEngineClient
from tests.unit.engines.weight_sync.gloo_support import Cleanup, DictReceiver, Model

pytestmark = pytest.mark.timeout(60)


class TwoProcesses(DictReceiver):
    """An engine of two processes, which are threads here. The weights of the second have `second/` in front."""

    links: Sequence[GlooReceiver] = ()

    def init_weight_transfer(self, init_info: Info) -> None:
        info = GlooInitInfo(**init_info)  # type: ignore[arg-type]
        with ThreadPoolExecutor(2) as threads:
            self.links = list(threads.map(GlooReceiver, [info] * 2, range(2)))

    def update_weights(self, update_info: Info) -> None:
        info = GlooUpdateInfo(**update_info)  # type: ignore[arg-type]
        loads = (self.load, self.load_second)
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(lambda link, load: link.receive(info, load), self.links, loads)
        assert first == second
        self.gate.received(first)

    def load_second(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights |= {f"second/{name}": tensor.clone() for name, tensor in tensors}


def opened(
    model: Model,
    client: LocalEngineClient,
    *,
    backend: str = "gloo",
    rank: int = 0,
    world_size: int = 1,
    num_receivers: int = 1,
    timeout_s: float = 1.0,
) -> WeightSender:
    """A rank's sender."""
    return make_sender(
        backend,
        ModuleSource(model, torch.float32),
        client,
        rank=rank,
        world_size=world_size,
        master_address="127.0.0.1",
        port=0,
        num_receivers=num_receivers,
        bucket_bytes=400,
        timeout_s=timeout_s,
    )


def test_every_process_of_an_engine_gets_the_weights(model: Model, cleanup: Cleanup) -> None:
    receivers = {name: TwoProcesses(name) for name in ("a", "b")}
    client = LocalEngineClient(receivers)
    sender = opened(model, client, num_receivers=4, timeout_s=10.0)
    cleanup += [client, sender]
    report = sender.send(1)
    assert (report.num_buckets, report.num_remote_calls) == (5, 6)
    own = dict(model.named_parameters())
    for receiver in receivers.values():
        assert receiver.gate.enter(0) == 1
        assert receiver.weights.keys() == {*own, *(f"second/{name}" for name in own)}
        assert all(torch.equal(tensor, own[name.removeprefix("second/")]) for name, tensor in receiver.weights.items())


def test_other_ranks_gather_and_never_contact_an_engine(model: Model) -> None:
    client = LocalEngineClient({"a": DictReceiver("a")})
    sender = opened(model, client, rank=1, world_size=2)
    assert isinstance(sender, GatherOnlySender)
    report = sender.send(4)
    assert (report.version, report.digest, report.num_remote_calls) == (4, "", 0)
    client.close()


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_trainer_is_a_config_error(rank: int, model: Model) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of 2 does not exist"):
        opened(model, LocalEngineClient({"a": DictReceiver("a")}), rank=rank, world_size=2)


def test_an_unknown_backend_is_a_config_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        opened(model, LocalEngineClient({"a": DictReceiver("a")}), backend="carrier-pigeon")
