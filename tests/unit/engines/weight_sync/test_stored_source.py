"""What is sent to an engine that loads checkpoints are the tensors of a checkpoint."""

from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from rlhf.engines.models.text_part import language_model_class
from rlhf.engines.weight_sync.buckets import Bucket, plan_buckets
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.engines.weight_sync.stored_source import StoredSource
from rlhf.errors import WeightSyncError
from tests.family_models import write_family
from tests.tiny_models import FAMILIES, make_family

WITH_TOWERS = ("gemma3", "mistral3", "qwen3_5", "qwen3_5_moe")


def trained(folder: Path, family: str) -> PreTrainedModel:
    base = write_family(folder / "base", family) if family in WITH_TOWERS else make_family(folder / "base", family)
    model: PreTrainedModel = language_model_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *WITH_TOWERS])
@pytest.mark.parametrize("bucket_bytes", [1, 60_000, 10_000_000])
def test_the_tensors_are_those_that_transformers_would_store(family: str, bucket_bytes: int, tmp_path: Path) -> None:
    model = trained(tmp_path, family)
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {name for name in model.state_dict() if name not in parameters}
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    source = StoredSource(ModuleSource(model, torch.float32), model)
    sent: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}
    for bucket in plan_buckets(source.specs(), torch.float32, bucket_bytes):
        flat = torch.full((bucket.numel,), torch.nan)
        source.gather(bucket, flat).wait(1.0)
        sent |= {name: view.clone() for name, view in bucket.views(flat)}
        given |= dict(source.materialize(bucket))
    assert sent.keys() == given.keys() == {name for name in stored if name not in buffers}
    for name, tensor in sent.items():
        assert torch.equal(tensor, stored[name]), name
        assert torch.equal(given[name], stored[name]), name


def test_a_bucket_that_splits_an_expert_is_refused(tmp_path: Path) -> None:
    model = trained(tmp_path, "mixtral")
    source = StoredSource(ModuleSource(model, torch.float32), model)
    half = Bucket.of([spec for spec in source.specs() if "layers.0.block_sparse_moe.experts.0.w1" in spec.name])
    assert len(half.parameters) == 1
    with pytest.raises(WeightSyncError, match="splits tensors that are converted together"):
        source.gather(half, torch.zeros(half.numel))


class Fused(torch.nn.Module):
    """Two matrices in memory that a checkpoint stores as one, and a layer that is stored as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        self.layers[0].k = torch.nn.Parameter(torch.full((1, 3), 1.0))
        self.layers[0].v = torch.nn.Parameter(torch.full((2, 3), 2.0))
        self.layers[1].o = torch.nn.Parameter(torch.full((2,), 3.0))


def fuse(_model: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = dict(tensors)
    if {"layers.0.k", "layers.0.v"} <= kept.keys():
        kept["layers.0.kv"] = torch.cat([kept.pop("layers.0.k"), kept.pop("layers.0.v")])
    return kept


def test_tensors_that_are_stored_as_one_are_converted_together_and_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf.engines.weight_sync.stored_source.revert_weight_conversion", fuse)
    source = StoredSource(ModuleSource(Fused(), torch.float32), cast(PreTrainedModel, None))
    assert [(spec.name, spec.shape) for spec in source.specs()] == [("layers.0.kv", (3, 3)), ("layers.1.o", (2,))]
    bucket = Bucket.of(source.specs())
    flat = torch.full((bucket.numel,), torch.nan)
    source.gather(bucket, flat).wait(1.0)
    assert flat.tolist() == [1] * 3 + [2] * 6 + [3] * 2
    assert {name: tensor.flatten().tolist() for name, tensor in source.materialize(bucket)} == {
        "layers.0.kv": [1] * 3 + [2] * 6,
        "layers.1.o": [3, 3],
    }


def test_each_tensor_of_a_plain_model_is_converted_by_itself(tmp_path: Path) -> None:
    model = trained(tmp_path, "qwen3")
    source = StoredSource(ModuleSource(model, torch.float32), model)
    assert len(source._groups) == len(list(model.parameters()))
