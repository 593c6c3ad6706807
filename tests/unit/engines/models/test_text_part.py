"""Models that read images as well: loaded and exported whole, text alone learns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.models import LoraSection, ModelSection
from rlhf.engines.models.adapters import adapters_of, add_adapters
from rlhf.engines.models.loading import LoadedModel, load_model
from rlhf.engines.models.text_part import freeze_other_parts
from rlhf.errors import ModelError
from rlhf.types import Head
from tests.family_models import write_family
from tests.models_page import difference, examined, one_rank

TOWERS = {"qwen3_5": "visual", "gemma3": "vision_tower", "mistral3": "vision_tower"}

# Importing DeepSpeed warns.
pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(folder: Path) -> LoadedModel:
    where, cpu = "policy.model", torch.device("cpu")
    return load_model(ModelSection(), str(folder), Head.LOG_PROBS, where=where, device=cpu, seed=0, new_head=False)


@pytest.mark.parametrize("family", TOWERS)
def test_a_model_that_reads_images_keeps_its_tower_and_learns_text(family: str, tmp_path: Path) -> None:
    from rlhf.engines.training.export import check_export, export_model  # noqa: PLC0415  imports DeepSpeed

    one = loaded(write_family(tmp_path / "base", family))
    freeze_other_parts(one.model)
    packed_model, found = examined(one)
    assert difference(packed_model) <= found.tolerance
    packed_model.head.get_parameter("weight").data.mul_(2.0)
    with one_rank():
        export_model(one, tmp_path / "exported", LoraSection())
        check_export(one, tmp_path / "exported", where="policy.model")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "exported"))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.endswith(("lm_head.weight", "embed_tokens.weight")) for name in changed)
    frozen = {name for name, parameter in one.model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert {name for name in frozen if "language_model" in name or name.startswith("lm_head")} == set()
    assert any(TOWERS[family] in name for name in frozen)


@pytest.mark.parametrize("family", TOWERS)
def test_adapters_are_added_to_text_layers_alone(family: str, tmp_path: Path) -> None:
    model = loaded(write_family(tmp_path, family)).model
    add_adapters(model, LoraSection(rank=2), seed=0, where="policy.lora.targets")
    assert adapters_of(model)
    assert all(name.startswith("model.language_model.") for name in adapters_of(model))


def test_llama_4_with_its_tower_is_refused_by_name(tmp_path: Path) -> None:
    """Its text part, with the output layer, is a language model of its own inside."""
    write_family(tmp_path, "llama4")
    with pytest.raises(ModelError, match="a Llama4ForConditionalGeneration has no linear output layer called lm_head"):
        examined(loaded(tmp_path))
