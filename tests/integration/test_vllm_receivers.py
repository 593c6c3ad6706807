"""What vLLM's receiving engines do with weights that arrive, without a model that computes."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.gloo_group import BufferPool
from rlhf.engines.weight_sync.plugin import ADAPTER_BACKENDS, ADAPTER_ID, BACKENDS, register
from rlhf.errors import WeightSyncError

with warnings.catch_warnings(action="ignore"):  # importing vLLM warns
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.lora.lora_model import LoRAModel
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

    from rlhf.engines.weight_sync.cpu_reload import LARGE, Scratch
    from rlhf.engines.weight_sync.gpt_oss import one_by_one
    from rlhf.engines.weight_sync.vllm_adapters import (
        GlooAdapterEngine,
        IncomingAdapters,
        IpcAdapterEngine,
        _AdapterReceiver,
    )
    from rlhf.engines.weight_sync.vllm_receivers import (
        DigestingEngine,
        GlooWeightTransferEngine,
        NcclWeightTransferEngine,
    )

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3.0)}
LAYER = "base_model.model.model.layers.0.mlp.up_proj"
PLACE = "model.layers.0.mlp.up_proj"


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    whole = TensorDigest()
    dict(whole.record(tensors.items()))
    return whole.hexdigest()


class Model(torch.nn.Module):
    """Takes weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.weights |= dict(weights)
        return set(self.weights)


class Manager:
    """vLLM's manager of the adapters of a model with one place for them."""

    def __init__(self, *places: str) -> None:
        self.modules = dict.fromkeys(places)
        self.model: Any = torch.nn.Module()
        self.lora_config = SimpleNamespace(lora_dtype=torch.float32)
        self.vocab_size = 8
        self.events: list[object] = []
        self.adapters: LoRAModel | None = None

    def remove_adapter(self, adapter_id: int) -> None:
        self.events.append(("remove", adapter_id))

    def add_adapter(self, adapters: LoRAModel) -> None:
        self.events.append(("add", adapters.id))
        self.adapters = adapters

    def activate_adapter(self, adapter_id: int) -> None:
        self.events.append(("activate", adapter_id))


class Medium(WeightTransferEngine):  # type: ignore[misc]
    """An engine of vLLM's that gives WEIGHTS, and notes what it is asked."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.events: list[str] = []

    def init_transfer_engine(self, init_info: object) -> None:
        del init_info

    def start_weight_update(self) -> None:
        self.events.append("start")

    def receive_weights(self, update_info: object) -> None:
        self.events.append(f"receive {update_info}")
        self.model.load_weights(iter(WEIGHTS.items()))

    def finish_weight_update(self) -> None:
        self.events.append("finish")

    def shutdown(self) -> None:
        self.events.append("shutdown")


class WholeEngine(DigestingEngine, Medium):
    pass


class AdapterEngine(_AdapterReceiver, Medium):
    pass


def test_the_digest_is_of_what_the_model_got() -> None:
    model = Model()
    engine = WholeEngine(model)
    assert engine.received == ""
    for number in (1, 2):
        engine.start_weight_update()
        engine.receive_weights(number)
        assert engine.model is model
        assert model.weights == WEIGHTS
        engine.finish_weight_update()
        assert engine.received == digest_of(WEIGHTS)
    assert engine.events == ["start", "receive 1", "finish", "start", "receive 2", "finish"]


def test_a_model_that_fails_to_load_stays_the_engines_model() -> None:
    class Refusing(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            raise KeyError(next(iter(weights))[0])

    model = Refusing()
    engine = WholeEngine(model)
    engine.start_weight_update()
    with pytest.raises(KeyError):
        engine.receive_weights(1)
    assert engine.model is model


def test_a_buffer_is_loaded_before_the_next_one_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM receives them on two streams, and a layer may lie in two buffers."""
    events: list[str] = []

    class Noting(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            events.append("load")
            return super().load_weights(weights)

    stream = SimpleNamespace(synchronize=lambda: events.append("end"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    engine: Any = NcclWeightTransferEngine.__new__(NcclWeightTransferEngine)
    engine.model = Noting()
    assert engine.load_target.load_weights(WEIGHTS.items()) == set(WEIGHTS)
    assert events == ["load", "end"]


def test_a_linear_layer_that_a_reload_gave_nothing_is_named() -> None:
    """vLLM gives such a layer its old weights back."""
    model, layer = Model(), LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(layer)
    model.add_module("up_proj", layer)
    engine = WholeEngine(model)
    info = get_layerwise_info(layer)
    info.load_numel, info.load_numel_total = 8, 8
    engine.start_weight_update()
    engine.finish_weight_update()
    assert engine.received
    info.load_numel = 0
    engine.start_weight_update()
    with pytest.raises(WeightSyncError, match="1 layers got no weights: up_proj"):
        engine.finish_weight_update()


def test_experts_of_a_layer_are_loaded_one_by_one() -> None:
    weights = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.arange(12.0).view(2, 2, 3),
        "model.layers.0.mlp.experts.down_proj_bias": torch.arange(2.0).view(2, 1),
        "model.layers.0.mlp.router.weight": torch.ones(2),
    }
    assert {name: weight.tolist() for name, weight in one_by_one(weights.items())} == {
        "model.layers.0.mlp.experts.0.gate_up_proj": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        "model.layers.0.mlp.experts.1.gate_up_proj": [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]],
        "model.layers.0.mlp.experts.0.down_proj_bias": [0.0],
        "model.layers.0.mlp.experts.1.down_proj_bias": [1.0],
        "model.layers.0.mlp.router.weight": [1.0, 1.0],
    }


def test_an_engine_that_joined_no_group_says_so() -> None:
    engine = GlooWeightTransferEngine.__new__(GlooWeightTransferEngine)
    with pytest.raises(WeightSyncError, match="no weight transfer group was joined"):
        _ = engine.receiver
    engine.shutdown()


def test_both_kinds_of_engines_are_registered_for_every_backend() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    register()
    register()
    for names in (BACKENDS, ADAPTER_BACKENDS):
        for medium, name in names.items():
            engine = WeightTransferEngineFactory._registry[name]()
            assert engine.__name__.lower().startswith(medium)
            assert engine.__name__.endswith("AdapterEngine") == (names is ADAPTER_BACKENDS)


def adapters(rank: int = 2, layer: str = LAYER) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.randn(rank, 3), f"{layer}.lora_B.weight": torch.randn(4, rank)}


def test_adapters_take_the_place_of_the_older_ones_as_they_were_sent() -> None:
    manager = Manager(PLACE)
    arriving = IncomingAdapters(SimpleNamespace(lora_manager=manager))
    sent = adapters()
    down, up = (tensor.clone() for tensor in sent.values())
    for name, tensor in sent.items():
        assert arriving.load_weights([(name, tensor)]) == {name}
        tensor.zero_()  # the sender uses its buffer again
    arriving.install()
    assert manager.events == [("remove", ADAPTER_ID), ("add", ADAPTER_ID), ("activate", ADAPTER_ID)]
    assert manager.adapters is not None
    assert manager.adapters.rank == 2
    (layer,) = manager.adapters.loras.values()
    assert layer.module_name == PLACE
    torch.testing.assert_close(layer.lora_b @ layer.lora_a * layer.scaling, up @ down)


def test_adapters_of_several_ranks_or_without_a_place_are_refused() -> None:
    manager = Manager(PLACE)
    mixed = IncomingAdapters(SimpleNamespace(lora_manager=manager))
    mixed.load_weights([*adapters(2).items(), *adapters(3, LAYER.replace("up", "down")).items()])
    with pytest.raises(WeightSyncError, match=r"adapters of one LoRA rank, received ranks \[2, 3\]"):
        mixed.install()
    assert manager.events == []
    lost = IncomingAdapters(SimpleNamespace(lora_manager=manager))
    lost.load_weights(adapters(layer=LAYER.replace("up", "side")).items())
    with pytest.raises(WeightSyncError, match=r"no place for 1 of the adapters \(first: model\.layers\.0\.mlp\.side_p"):
        lost.install()
    assert ("activate", ADAPTER_ID) not in manager.events


def test_a_stage_takes_the_adapters_of_its_own_layers() -> None:
    """Those of the others arrive too, and a layer that is nowhere is still an error."""
    manager, model = Manager(PLACE), torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Identity(), PPMissingLayer(), *map(torch.nn.Identity, range(9))])
    manager.model.add_module("model", model)
    arriving = IncomingAdapters(SimpleNamespace(lora_manager=manager))
    arriving.load_weights([*adapters().items(), *adapters(layer=LAYER.replace("0", "1")).items()])
    arriving.install()
    assert manager.events[-1] == ("activate", ADAPTER_ID)
    lost = IncomingAdapters(SimpleNamespace(lora_manager=manager))
    lost.load_weights([*adapters().items(), *adapters(layer=LAYER.replace("0", "10")).items()])
    with pytest.raises(WeightSyncError, match=r"no place for 1 of the adapters \(first: model\.layers\.10\.mlp\.up_p"):
        lost.install()


def test_names_are_those_that_the_model_uses() -> None:
    manager = Manager("inner.mlp.up_proj")
    manager.model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.layers.0": "inner"})
    arriving = IncomingAdapters(SimpleNamespace(lora_manager=manager))
    arriving.load_weights(adapters().items())
    arriving.install()
    assert ("activate", ADAPTER_ID) in manager.events


def test_the_base_model_takes_no_part_in_an_update_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(PLACE)
    engine = AdapterEngine(SimpleNamespace(lora_manager=manager))
    sent = adapters()
    monkeypatch.setattr("tests.integration.test_vllm_receivers.WEIGHTS", sent)
    engine.start_weight_update()
    engine.receive_weights(1)
    engine.finish_weight_update()
    assert engine.received == digest_of(sent)
    assert engine.events == ["receive 1"]
    engine.install()
    assert manager.events[-1] == ("activate", ADAPTER_ID)


def test_each_update_over_gloo_brings_its_own_adapters() -> None:
    manager, sent = Manager(PLACE), adapters()

    class Link:
        def receive(self, info: object, load: Callable[[Iterable[tuple[str, torch.Tensor]]], object]) -> str:
            load(sent.items())
            return f"digest of {info}"

    engine: Any = GlooAdapterEngine.__new__(GlooAdapterEngine)
    engine.model, engine._receiver = SimpleNamespace(lora_manager=manager), Link()
    engine.start_weight_update()
    engine.receive_weights(1)
    assert engine.received == "digest of 1"
    engine.install()
    assert manager.events[-1] == ("activate", ADAPTER_ID)
    engine.start_weight_update()
    assert engine.received == ""
    with pytest.raises(WeightSyncError, match=r"received ranks \[\]"):
        engine.install()


def test_the_trainers_buffer_is_let_go_after_an_update_over_ipc() -> None:
    events: list[str] = []
    engine: Any = IpcAdapterEngine.__new__(IpcAdapterEngine)
    engine.model = SimpleNamespace(lora_manager=Manager(PLACE))
    engine._packed_importer = SimpleNamespace(close=lambda: events.append(engine.received))
    engine.start_weight_update()
    engine.finish_weight_update()
    assert events == [digest_of({})]


@pytest.fixture
def scratch() -> Iterator[Callable[..., Any]]:
    """`torch.empty_strided` under a scratch of twice the least size."""
    mode = Scratch(2 * LARGE)
    with mode:
        yield torch.empty_strided


def test_large_tensors_use_one_buffer_and_others_do_not(scratch: Callable[..., Any]) -> None:
    numel = LARGE // 4
    first = scratch((numel // 4, 4), (4, 1), dtype=torch.float32)
    address = first.data_ptr()
    assert (first.shape, first.dtype) == ((numel // 4, 4), torch.float32)
    other = scratch((numel,), (1,), dtype=torch.float32)
    assert other.data_ptr() != address
    del first
    assert scratch((2 * numel,), (1,), dtype=torch.float32).data_ptr() == address, "of the largest size"
    for size, stride, dtype in (
        ((numel - 1,), (1,), torch.float32),
        ((2 * numel + 1,), (1,), torch.float32),
        ((numel // 2, 4), (1, numel // 2), torch.float32),
    ):
        given = scratch(size, stride, dtype=dtype)
        assert given.data_ptr() != address
        assert given.stride() == stride
    assert scratch((numel // 2, 4), (4, 1), dtype=torch.bfloat16).data_ptr() == address


def test_a_pool_lends_what_fits() -> None:
    assert len(BufferPool(10).take(10)) == 10
