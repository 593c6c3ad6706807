"""Adapters on the experts of a layer, which are one tensor: what computes, what is sent and what is exported agree."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from rlhf.config.models import LoraSection, ModelSection
from rlhf.engines.models.adapter_names import expert_tensors
from rlhf.engines.models.adapters import adapters_of, add_adapters
from rlhf.engines.models.loading import LoadedModel, load_model
from rlhf.engines.models.text_part import language_model_class
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.sources import make_source
from rlhf.types import Head
from tests.family_models import write_family
from tests.models_page import difference, examined, one_rank

pytestmark = pytest.mark.filterwarnings("ignore")  # importing DeepSpeed warns
TARGETS = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
SECTION = LoraSection(rank=2, alpha=6.0, targets=TARGETS)
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_5_moe")


def adapted(folder: Path) -> LoadedModel:
    """With adapters that change what the model computes."""
    where, cpu = "policy.model", torch.device("cpu")
    one = load_model(ModelSection(), str(folder), Head.LOG_PROBS, where=where, device=cpu, seed=0, new_head=False)
    before = logits(one.model)
    add_adapters(one.model, SECTION, seed=0, where="policy.lora.targets")
    assert torch.equal(logits(one.model), before)
    with torch.no_grad():
        for parameter in one.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    assert float((logits(one.model) - before).abs().max()) > 0.1
    return one


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    model.set_attn_implementation("eager")
    found: torch.Tensor = model.eval()(input_ids=torch.arange(4, 40)[None], use_cache=False).logits
    return found


def read(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = language_model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_computes_what_the_adapted_model_computes(family: str, tmp_path: Path) -> None:
    """Merged, and as an adapter that peft adds to the first model. Engines get the tensors of the merged one."""
    from rlhf.engines.training.export import check_export, export_model  # noqa: PLC0415  imports DeepSpeed

    base = write_family(tmp_path / "base", family)
    one = adapted(base)
    expected = logits(one.model)
    packed_model, found = examined(one)
    assert difference(packed_model) <= found.tolerance
    with one_rank():
        export_model(one, tmp_path / "exported", SECTION)
        check_export(one, tmp_path / "exported", where="policy.model")
    torch.testing.assert_close(logits(read(tmp_path / "exported")), expected, rtol=1e-4, atol=1e-4)
    added = PeftModel.from_pretrained(read(base), tmp_path / "exported" / "adapter")
    torch.testing.assert_close(logits(added), expected, rtol=1e-4, atol=1e-4)
    source = make_source(one.model, "float32", stored_names=True)
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for bucket in plan_buckets(source.specs(), torch.float32, 100_000):
        flat = torch.full((bucket.numel,), torch.nan)
        source.gather(bucket, flat).wait(1.0)
        for name, sent in bucket.views(flat):
            assert torch.equal(sent, exported.pop(name)), name
    assert not [name for name in exported if "experts" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_experts_is_adapted_and_merged_as_defined(family: str, tmp_path: Path) -> None:
    """W_e + scale * B_e @ A_e for each expert e, with peft's order of rows and columns."""
    base = write_family(tmp_path / "base", family)
    plain, model = dict(read(base).named_parameters()), adapted(base).model
    found = {name: adapter for name, adapter in adapters_of(model).items() if "experts" in name}
    assert sorted(found) == sorted(expert_tensors(read(base)))
    for name, adapter in found.items():
        number, rank = len(plain[name]), SECTION.rank
        merged = adapter.gathered().merged_into(plain[name].detach())
        for e in range(number):
            product = adapter.up[:, e::number] @ adapter.down[e * rank : (e + 1) * rank] * 3.0
            delta = product.T if family == "gpt_oss" else product
            torch.testing.assert_close(merged[e], (plain[name][e] + delta).detach())
