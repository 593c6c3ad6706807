"""The gloo medium, with receivers in threads of this process: what arrives, what is refused, and by what name."""

import re
import threading
import time
from collections.abc import Iterable

import pytest
import torch

from rlhf.engines.rollout.serving import ServingState
from rlhf.engines.weight_sync.base import Info
from rlhf.engines.weight_sync.gloo import GlooSender, _PendingBroadcast
from rlhf.engines.weight_sync.gloo_group import BufferPool
from rlhf.errors import WeightSyncError
from tests.local_engine_client import LocalEngineClient
from tests.unit.engines.weight_sync.gloo_support import Cleanup, DictReceiver, Model, open_sender

pytestmark = pytest.mark.timeout(60)


class AbsentReceiver(DictReceiver):
    """Never joins."""

    def init_weight_transfer(self, init_info: Info) -> None:
        del init_info
        time.sleep(3)


class DyingReceiver(DictReceiver):
    """Loses its connection when the second bucket has arrived."""

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load(tensors)
        if len(self.weights) > 1:
            assert self.link is not None
            self.link.close()


class DamagingSender(GlooSender):
    """Flips one bit of a bucket behind its seal, as a bad network card would."""

    damage = -1
    _sent = 0

    def _broadcast(self, buffer: torch.Tensor) -> torch.distributed.Work:
        if self._sent == self.damage:
            buffer[5] ^= 4
        self._sent += 1
        return super()._broadcast(buffer)


Receivers = dict[str, DictReceiver]


@pytest.mark.parametrize("num_engines", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_engine_gets_the_weights_of_the_version(
    model: Model, cleanup: Cleanup, num_engines: int, dtype: torch.dtype
) -> None:
    receivers = {f"rollout-{i}": DictReceiver(f"rollout-{i}") for i in range(num_engines)}
    sender = open_sender(GlooSender, model, receivers, cleanup, dtype=dtype)
    digests = []
    for version in (1, 2):
        report = sender.send(version)
        digests.append(report.digest)
        assert report.num_remote_calls == 3 * num_engines
        assert report.num_buckets > 3
        assert report.num_bytes == sum(p.numel() for p in model.parameters()) * dtype.itemsize
        for receiver in receivers.values():
            assert receiver.gate.enter(0) == version
            assert {name: t.tolist() for name, t in receiver.weights.items()} == {
                name: p.to(dtype).tolist() for name, p in model.named_parameters()
            }
        with torch.no_grad():
            model.head.weight[3, 3] += 1
    assert len(set(digests)) == 2


def test_equal_weights_have_equal_digests_whatever_the_buckets_held_before(model: Model, cleanup: Cleanup) -> None:
    sender = open_sender(GlooSender, model, {"a": DictReceiver("a")}, cleanup)
    assert sender.send(1).digest == sender.send(2).digest


def test_remote_calls_do_not_grow_with_parameters_or_buckets(model: Model, cleanup: Cleanup) -> None:
    few = open_sender(GlooSender, model, {"a": DictReceiver("a")}, cleanup, bucket_bytes=1 << 20).send(1)
    many = open_sender(GlooSender, model, {"a": DictReceiver("a")}, cleanup, bucket_bytes=1).send(1)
    assert few.num_buckets < many.num_buckets
    assert few.num_remote_calls == many.num_remote_calls == 3


def test_a_damaged_bucket_is_named_and_the_engine_serves_nothing_until_a_complete_sync(
    model: Model, cleanup: Cleanup
) -> None:
    receivers: Receivers = {name: DictReceiver(name) for name in ("rollout-0", "rollout-1")}
    sender = open_sender(DamagingSender, model, receivers, cleanup)
    assert isinstance(sender, DamagingSender)
    assert sender.send(1).version == 1
    sender.damage = sender._sent + 2
    with pytest.raises(WeightSyncError) as caught:
        sender.send(7)
    for name in receivers:
        assert f"engine {name}: version 7: bucket 3 of 5 (layers.1.weight to layers.1.bias)" in str(caught.value)
    for receiver in receivers.values():
        assert receiver.gate.state is ServingState.FAILED
        with pytest.raises(WeightSyncError, match="serves nothing until a complete sync"):
            receiver.gate.enter(0)
    sender.send(8)  # the group outlived the refusal
    assert [receiver.gate.enter(0) for receiver in receivers.values()] == [8, 8]


def test_weights_that_cannot_be_loaded_fail_only_that_engine(model: Model, cleanup: Cleanup) -> None:
    receivers = {"good": DictReceiver("good"), "bad": DictReceiver("bad", unloadable="layers.0.weight")}
    sender = open_sender(GlooSender, model, receivers, cleanup)
    with pytest.raises(WeightSyncError, match="engine bad: version 1: bucket 2 of 5 cannot be loaded") as caught:
        sender.send(1)
    assert "engine good" not in str(caught.value)
    assert set(receivers["good"].weights) == set(dict(model.named_parameters()))


class ForgetfulReceiver(DictReceiver):
    """Serves what arrived, and names another digest."""

    def finish_weight_update(self, version: int, digest: str) -> str:
        self.gate.serve(version, digest)
        return "other"


def test_only_an_engine_with_another_digest_is_named(model: Model, cleanup: Cleanup) -> None:
    receivers: Receivers = {"right": DictReceiver("right"), "wrong": ForgetfulReceiver("wrong")}
    with pytest.raises(WeightSyncError, match=r"^engine wrong: version 1: digest other, need \w{32}$"):
        open_sender(GlooSender, model, receivers, cleanup).send(1)


def test_an_engine_that_never_joins_is_named_after_the_timeout(model: Model, cleanup: Cleanup) -> None:
    receivers = {"here": DictReceiver("here"), "absent": AbsentReceiver("absent")}
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="engine absent: did not join"):
        open_sender(GlooSender, model, receivers, cleanup, timeout_s=1.0)
    assert time.monotonic() - start < 2.5


def test_an_engine_that_dies_during_a_sync_fails_it_in_time_and_a_new_sender_works(
    model: Model, cleanup: Cleanup
) -> None:
    receivers: Receivers = {"well": DictReceiver("well"), "dying": DyingReceiver("dying")}
    sender = open_sender(GlooSender, model, receivers, cleanup, timeout_s=2.0)
    start = time.monotonic()
    with pytest.raises(WeightSyncError) as caught:
        sender.send(1)
    said = str(caught.value)
    assert said.startswith("version 1: engine "), "the client's report comes first"
    assert re.search(r"engine dying: version 1: bucket \d of 5 did not arrive", said)
    assert re.search(r"\nengine dying: [12] of 5 buckets of version 1 arrived\n", said)
    assert time.monotonic() - start < 6
    with pytest.raises(WeightSyncError, match="Build a new sender"):
        sender.send(2)
    receivers = {"well": receivers["well"], "fresh": DictReceiver("fresh")}
    open_sender(GlooSender, model, receivers, cleanup).send(3)
    assert receivers["well"].gate.enter(0) == receivers["fresh"].gate.enter(0) == 3


class SlowClient(LocalEngineClient):
    """Says who was silent, once the deadline is over and it has looked after them."""

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        time.sleep(timeout_s + 0.5)
        raise WeightSyncError("no answer from stuck, which is stopped")


def test_the_sender_waits_for_the_clients_report_about_an_engine_that_does_not_reply(
    model: Model, monkeypatch: pytest.MonkeyPatch, cleanup: Cleanup
) -> None:
    """Also where nothing is left to send, as of a model of one bucket that the engine hangs in loading."""
    sender = open_sender(GlooSender, model, {"stuck": DictReceiver("stuck")}, cleanup, timeout_s=1.0)
    monkeypatch.setattr(sender._client, "update_weights", SlowClient.update_weights.__get__(sender._client))
    monkeypatch.setattr(sender, "_broadcast", lambda _buffer: None)
    with pytest.raises(WeightSyncError, match="which is stopped"):
        sender.send(1)


def test_a_client_that_does_not_report_itself_is_not_waited_for_without_end(
    model: Model, monkeypatch: pytest.MonkeyPatch, cleanup: Cleanup
) -> None:
    monkeypatch.setattr("rlhf.engines.weight_sync.gloo.HEALTH_CHECK_S", 0.0)
    monkeypatch.setattr("rlhf.engines.weight_sync.gloo.CLIENT_MARGIN_S", 0.0)
    sender = open_sender(GlooSender, model, {"stuck": DictReceiver("stuck")}, cleanup, timeout_s=0.5)
    monkeypatch.setattr(sender._client, "update_weights", lambda _info, _timeout_s: time.sleep(3))
    monkeypatch.setattr(sender, "_broadcast", lambda _buffer: None)
    with pytest.raises(WeightSyncError, match=r"^engines stuck: no reply within 0\.5 s$"):
        sender.send(1)


def test_tied_weights_are_sent_once(cleanup: Cleanup) -> None:
    model = Model()
    model.head.weight = model.embed.weight
    receiver = DictReceiver("a")
    report = open_sender(GlooSender, model, {"a": receiver}, cleanup).send(1)
    assert "head.weight" not in receiver.weights
    assert report.num_bytes == (50 * 8 + 3 * 72) * 4


def test_a_buffer_is_reused_only_when_no_view_of_it_is_left() -> None:
    pool = BufferPool(100)
    first = pool.take(60)
    view = first[10:20].view(torch.int16).view(5, 1)
    address = first.data_ptr()
    assert pool.take(100).data_ptr() != address
    del first
    assert pool.take(100).data_ptr() != address
    view.fill_(7)
    del view
    taken = [pool.take(10), pool.take(20)]
    assert address in [buffer.data_ptr() for buffer in taken]
    assert taken[0].data_ptr() != taken[1].data_ptr()


class KeepingReceiver(DictReceiver):
    """Keeps views, not copies, as a loader does that waits for the rest of a layer."""

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights.update(tensors)


def test_a_loader_may_keep_what_it_was_given(model: Model, cleanup: Cleanup) -> None:
    receiver = KeepingReceiver("a")
    sender = open_sender(GlooSender, model, {"a": receiver}, cleanup, bucket_bytes=1)
    sender.send(1)
    kept = dict(receiver.weights)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    sender.send(2)
    assert all(torch.equal(kept[name], before[name]) for name in before)


class LookingReceiver(DictReceiver):
    """Reads what it is given and keeps none of it."""

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in tensors:
            tensor.sum()


def test_a_receiver_has_two_buffers_however_late_the_thread_of_gloo_is(
    cleanup: Cleanup,
) -> None:
    """The bucket that is loaded, and the next one on its way."""
    model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(12)))
    for name in ("a", "b", "c"):
        receiver = LookingReceiver(name)
        sender = open_sender(GlooSender, model, {name: receiver}, cleanup, bucket_bytes=1)
        for version in range(20):
            sender.send(version)
        assert receiver.link is not None
        assert len(receiver.link._pool._arrays) == 2


def test_no_thread_is_left_waiting(model: Model, cleanup: Cleanup) -> None:
    before = threading.active_count()
    sender = open_sender(GlooSender, model, {"a": DictReceiver("a")}, cleanup)
    sender.send(1)
    for each in cleanup:
        each.close()
    cleanup.clear()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


class Work:
    """A broadcast that fails when it is waited for."""

    def wait(self, timeout: object) -> None:
        raise RuntimeError(f"late by {timeout}")


def test_nothing_is_sent_after_the_first_failure() -> None:
    sent: list[torch.Tensor] = []

    def closed(buffer: torch.Tensor) -> torch.distributed.Work:
        sent.append(buffer)
        raise RuntimeError("closed")

    def late(buffer: torch.Tensor) -> torch.distributed.Work:
        sent.append(buffer)
        return Work()  # type: ignore[return-value]

    for broadcast, reason in ((closed, "closed"), (late, "late by 0:00:03")):
        sent.clear()
        pending = _PendingBroadcast(3.0)
        for _ in range(3):
            pending.start(broadcast, torch.zeros(1))
            pending.wait()
        assert len(sent) == 1
        assert str(pending.failure) == reason
