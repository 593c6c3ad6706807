"""A model's size from its config.json is the size of the model that transformers builds from it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapter_names import expert_tensors, linear_layers
from rlhf.engines.models.adapters import add_adapters
from rlhf.errors import ModelError
from rlhf.planning.model_shape import ModelShape, model_shape
from tests.unit.planning.support import LLAMA_3_8B

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
}
MODELS = {
    "llama": {"model_type": "llama", **SMALL},
    "llama tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "llama biased": {"model_type": "llama", **SMALL, "attention_bias": True},
    "llama wide heads": {"model_type": "llama", **SMALL, "head_dim": 16},
    "mistral": {"model_type": "mistral", **SMALL},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen3": {"model_type": "qwen3", **SMALL},
    "gemma": {"model_type": "gemma", **SMALL},
    "gemma2": {"model_type": "gemma2", **SMALL},
    "gemma3": {"model_type": "gemma3_text", **SMALL},
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 320, "n_positions": 64},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3 moe": {
        "model_type": "qwen3_moe", **SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    },
    "qwen2 moe": {
        "model_type": "qwen2_moe", **SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}  # fmt: skip


def saved(config: dict[str, object], folder: Path) -> tuple[PreTrainedConfig, ModelShape]:
    """The config as transformers reads it, and the shape that its own config.json gives."""
    full = AutoConfig.for_model(**config)  # type: ignore[arg-type]
    full.save_pretrained(folder)
    return full, model_shape("policy.model", json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    config, shape = saved(MODELS[name], tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters == model.num_parameters()


def test_a_scorer_has_one_output(tmp_path: Path) -> None:
    config, shape = saved(MODELS["llama"], tmp_path)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert shape.as_scorer().num_parameters == model.num_parameters()


def test_a_familiar_model_has_its_published_size() -> None:
    shape = model_shape("policy.model", LLAMA_3_8B)
    assert shape.num_parameters == 8_030_261_248
    assert shape.kv_numbers_per_token * 2 == 128 * 1024  # bytes a token in bfloat16


def test_a_token_meets_its_experts_only() -> None:
    shape = model_shape("policy.model", MODELS["mixtral"])
    dense = model_shape("policy.model", MODELS["mistral"])
    assert shape.active_layer_parameters == dense.layer_parameters + 3 * 48 * 80 + 48 * 4


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (
            {
                "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
                "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            },
            30.5, 3.3,
        ),
        (
            {
                "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
                "num_local_experts": 8, "num_experts_per_tok": 2,
            },
            46.7, 12.9,
        ),
    ],
)  # fmt: skip
def test_familiar_experts_have_their_published_sizes(config: dict[str, object], total: float, active: float) -> None:
    """Qwen3-30B-A3B and Mixtral 8x7B, in billions."""
    shape = model_shape("policy.model", config)
    assert shape.num_parameters / 1e9 == pytest.approx(total, abs=0.06)
    assert shape.num_active_parameters / 1e9 == pytest.approx(active, abs=0.06)


def test_flops_are_two_a_weight_and_attention() -> None:
    shape = model_shape("policy.model", MODELS["llama"])
    weights = 3 * shape.layer_parameters + 320 * 48
    assert shape.flops_per_token(0) == 2 * weights
    assert shape.flops_per_token(100) - shape.flops_per_token(0) == 4 * 3 * 48 * 100


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ModelError, match=r"^policy.model: config.json has no num_hidden_layers"):
        model_shape("policy.model", {**LLAMA_3_8B, "num_hidden_layers": None})


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2" and not name.endswith(("moe", "mixtral"))])
def test_adapters_are_as_large_as_pefts(name: str, tmp_path: Path) -> None:
    config, shape = saved(MODELS[name], tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    weights = [f"{name}.base_layer.weight" for name in linear_layers(model)]
    add_adapters(model, LoraSection(rank=3), seed=0, where="policy.lora.targets")
    assert shape.adapter_parameters(3) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.linear_parameters == sum(model.get_parameter(name).numel() for name in weights)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_adapters_on_experts_are_as_large_as_pefts(name: str, tmp_path: Path) -> None:
    """Experts' adapters alone, and beside those of attention."""
    config, shape = saved(MODELS[name], tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    experts = [model.get_parameter(tensor).numel() for tensor in expert_tensors(model)]
    assert shape.num_layers * shape.expert_parameters == sum(experts)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")
    add_adapters(model, LoraSection(rank=3, targets=targets), seed=0, where="policy.lora.targets")
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.adapter_parameters(3, on_experts=True) == counted
    assert shape.adapter_parameters(3) < counted
