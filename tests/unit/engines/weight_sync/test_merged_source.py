"""What is sent of a model with LoRA adapters: the model without them, each matrix merged. The model stays as it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.weight_sync.adapter_source import AdapterSource
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec, plan_buckets
from rlhf.engines.weight_sync.merged_source import MergedSource
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.engines.weight_sync.source import Done, Gather
from rlhf.engines.weight_sync.sources import make_source
from rlhf.engines.weight_sync.stored_source import StoredSource
from tests.tiny_models import make_family, make_policy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing DeepSpeed warns

SCALE = 8 / 4
TARGETS = ("q_proj", "down_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "base", seed=0)


@pytest.fixture
def adapted(folder: Path) -> PreTrainedModel:
    """With adapters that change what the model computes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    add_adapters(model, LoraSection(rank=4, alpha=8, targets=TARGETS), seed=0, where="policy.lora.targets")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def merged_by_hand(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """W + scale * B @ A of each adapted matrix, and every other weight as the checkpoint has it."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    own = dict(model.named_parameters())
    merged = {}
    for name, weight in base.named_parameters():
        layer = name.removesuffix(".weight")
        down, up = own.get(f"{layer}.lora_A.default.weight"), own.get(f"{layer}.lora_B.default.weight")
        merged[name] = weight.detach() if down is None or up is None else (weight + SCALE * up @ down).detach()
    return merged


@pytest.mark.parametrize("bucket_bytes", [1, 60_000, 10_000_000])
def test_every_matrix_is_sent_merged_under_the_name_of_the_base_model(
    bucket_bytes: int, adapted: PreTrainedModel, folder: Path
) -> None:
    expected = merged_by_hand(adapted, folder)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    source = make_source(adapted, "float32")
    assert isinstance(source, MergedSource)
    assert source.dtype == torch.float32
    assert source.device == torch.device("cpu")
    assert {spec.name: spec.shape for spec in source.specs()} == {name: t.shape for name, t in expected.items()}
    sent: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}
    for bucket in plan_buckets(source.specs(), torch.float32, bucket_bytes):
        flat = torch.full((bucket.numel,), torch.nan)
        source.gather(bucket, flat).wait(1.0)
        sent |= {name: view.clone() for name, view in bucket.views(flat)}
        given |= dict(source.materialize(bucket))
    assert sent.keys() == given.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(sent[name], weight, msg=name)
        torch.testing.assert_close(given[name], weight, msg=name)
    changed = {name for name, weight in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
               if not torch.equal(weight, sent[name])}  # fmt: skip
    assert changed == {name for name in expected if any(f".{target}." in name for target in TARGETS)}
    after = adapted.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_matrices_are_merged_in_the_dtype_that_is_sent(adapted: PreTrainedModel, folder: Path) -> None:
    expected = merged_by_hand(adapted, folder)
    source = make_source(adapted, "bfloat16")
    (bucket,) = plan_buckets(source.specs(), torch.bfloat16, 10_000_000)
    flat = torch.empty(bucket.numel, dtype=torch.bfloat16)
    source.gather(bucket, flat).wait(1.0)
    for (name, view), (_, tensor) in zip(bucket.views(flat), source.materialize(bucket), strict=True):
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(view.float(), expected[name], rtol=0.02, atol=0.02, msg=name)
        assert torch.equal(view, tensor), name


class Late:
    """A source of one matrix of threes, which arrives when it is waited for."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, name: str) -> None:
        self.spec = ParameterSpec(name, (2, 2))
        self.events: list[str] = []
        self.flat: torch.Tensor | None = None

    def specs(self) -> list[ParameterSpec]:
        return [self.spec]

    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        assert bucket.parameters == (self.spec,)
        self.events.append("gather")
        self.flat = flat
        return self

    def wait(self, timeout_s: float) -> None:
        self.events.append(f"wait {timeout_s:g} s")
        if self.flat is not None:
            self.flat.fill_(3.0)

    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        yield self.spec.name, torch.full((2, 2), 3.0)


class Ones:
    """The adapter of `Late`'s matrix, 1 everywhere."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def gathered(self) -> "Ones":
        self._events.append("adapter")
        return self

    def merged_into(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix + 1


@pytest.mark.parametrize("is_sender", [True, False])
def test_small_matrices_are_gathered_before_large_ones_on_all_ranks(is_sender: bool) -> None:
    """Collectives must begin in the same order everywhere, and rank 0 merges what has arrived."""
    late = Late("layer.base_layer.weight")
    source = MergedSource(late, {"layer.weight": Ones(late.events)})  # type: ignore[dict-item]
    assert source.specs() == [ParameterSpec("layer.weight", (2, 2))]
    flat = torch.zeros(4) if is_sender else None
    gather = source.gather(Bucket.of(source.specs()), flat)
    assert late.events == ["adapter", "gather"]
    gather.wait(7.0)
    assert late.events == ["adapter", "gather", "wait 7 s"]
    assert flat is None or flat.tolist() == [4.0] * 4


def test_nothing_is_gathered_for_a_bucket_without_adapters() -> None:
    late = Late("layer.weight")
    source = MergedSource(late, {"other.weight": Ones(late.events)})  # type: ignore[dict-item]
    source.gather(Bucket.of(source.specs()), torch.zeros(4)).wait(1.0)
    assert dict(source.materialize(Bucket.of(source.specs())))["layer.weight"].tolist() == [[3.0, 3.0]] * 2
    assert "adapter" not in late.events


def test_the_source_fits_how_a_model_is_held(adapted: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(make_source(plain, "float32"), ModuleSource)
    assert isinstance(make_source(adapted, "float32", stored_names=True), StoredSource)
    experts = AutoModelForCausalLM.from_pretrained(make_family(tmp_path / "experts", "mixtral"))
    names = {spec.name for spec in make_source(experts, "float32", stored_names=True).specs()}
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
    assert names.isdisjoint(spec.name for spec in make_source(experts, "float32").specs() if "experts" in spec.name)


def test_adapters_alone_are_sent_with_their_scale(adapted: PreTrainedModel) -> None:
    source = AdapterSource(adapted, "float32")
    own = dict(adapted.named_parameters())
    assert len(source.specs()) == 2 * len(TARGETS) * 2
    (bucket,) = plan_buckets(source.specs(), torch.float32, 10_000_000)
    flat = torch.full((bucket.numel,), torch.nan)
    gather = source.gather(bucket, flat)
    assert isinstance(gather, Done)
    gather.wait(1.0)
    given = dict(source.materialize(bucket))
    for name, view in bucket.views(flat):
        layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        down, up = own[f"{layer}.lora_A.default.weight"], own[f"{layer}.lora_B.default.weight"]
        torch.testing.assert_close(view, down if ".lora_A." in name else up * SCALE, msg=name)
        assert torch.equal(view, given[name])
    assert isinstance(source.gather(bucket, None), Done)
