"""The tensors that a check expects are those that transformers' own model has."""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf.config.expected_tensors import FAMILIES, LINEAR_LAYERS, expected_tensors, require_expected_tensors
from rlhf.config.json_file import ModelFileError, read_json
from rlhf.engines.models.adapter_names import linear_layers, target_module

SIZES = {
    **{"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2},
}
VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"head_dim": 10},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"num_key_value_heads": 4, "tie_word_embeddings": False},
)


def saved(folder: Path, family: str, settings: dict[str, object]) -> tuple[dict[str, object], torch.nn.Module]:
    """A config.json as transformers writes it, and the model that it means, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family].from_dict(SIZES | settings))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return read_json(folder / "config.json"), model


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_transformers(family: str, settings: dict[str, object], tmp_path: Path) -> None:
    config, model = saved(tmp_path, family, settings)
    expected, found = expected_tensors(config), shapes(model)
    assert expected is not None
    head = {"lm_head.weight"}
    assert {name: shape for name, shape in found.items() if name not in head} == {
        name: shape for name, shape in expected.items() if name not in head
    }
    require_expected_tensors(config, found)
    assert {target_module(name) for name in linear_layers(model)} == set(LINEAR_LAYERS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "1 weights are missing (first: model.layers.1.mlp.up_proj.weight)",
        ),
        ({"lm_head.weight": None}, "1 weights are missing (first: lm_head.weight)"),
        ({"model.layers.0.mlp.up_proj.weight": (7, 24)}, "shape [7, 24], config.json gives [20, 24]"),
        ({"model.layers.3.mlp.up_proj.weight": (20, 24)}, "1 weights fit nothing in config.json"),
        ({"score.weight": (1, 24), "model.layers.0.self_attn.rotary_emb.inv_freq": (3,)}, None),
    ],
)
def test_what_differs_is_named(edit: dict[str, tuple[int, ...] | None], said: str | None, tmp_path: Path) -> None:
    config, model = saved(tmp_path, "llama", {"tie_word_embeddings": False})
    found = {name: shape for name, shape in (shapes(model) | edit).items() if shape is not None}
    if said is None:
        require_expected_tensors(config, found)
        return
    with pytest.raises(ModelFileError) as error:
        require_expected_tensors(config | {"tie_word_embeddings": False}, found)
    assert said in str(error.value)


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"hidden_size": "24"}, {"quantization_config": {}}])
def test_nothing_is_expected_of_what_is_not_known(change: dict[str, object], tmp_path: Path) -> None:
    config, _ = saved(tmp_path, "llama", {})
    assert expected_tensors(config | change) is None
