"""Tiny random models of the architectures that transformers knows: a config of each, with every size made small."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlhf.engines.models.noise import remove_noise

SIZES_BY_NAMES = {
    "hidden_size d_model n_embd dim embed_dim model_dim n_embed embedding_size lru_width attention_hidden_size "
    "word_embed_proj_dim decoder_embed_dim out_hidden_size projection_dim": 64,
    "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size moe_intermediate_size "
    "shared_expert_intermediate_size shared_intermediate_size dim_ff feed_forward_size expert_ffn_hidden_size "
    "intermediate_size_mlp block_ff_dim moe_shared_expert_intermediate_size dense_intermediate_size": 96,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_experts_per_tok moe_k moe_topk num_key_value_heads n_head_kv num_kv_heads n_mamba_heads "
    "linear_num_value_heads linear_num_key_heads": 2,
    "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads": 4,
    "n_group topk_group num_expert_group mamba_n_groups n_groups first_k_dense_replace": 1,
    "rotary_dim mamba_dt_rank time_step_rank patch_size": 8,
    "head_dim attention_head_dim kv_channels mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size "
    "linear_key_head_dim linear_value_head_dim kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "sliding_window hidden_size_per_layer_input": 16,
    "mamba_d_head mamba_head_dim q_lora_rank qk_head_dim image_size": 32,
    "max_position_embeddings n_positions n_ctx mamba_d_ssm": 128,
    "vocab_size vocab_size_per_layer_input": 160,
    "num_channels": 3,
}
SIZES = {name: size for names, size in SIZES_BY_NAMES.items() for name in names.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOWED = ["sliding_attention", "full_attention"]
INDEXER: dict[str, object] = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 16, "indexer_compress_ratio": 4,
}  # fmt: skip
SPECIAL: dict[str, dict[str, object]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 300,
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
        "global_config": {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8},
    },
    "cohere_compass_text": {
        "head_dim": 128,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in WINDOWED},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": WINDOWED * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 96,
    },
    "emu3": {"text_config": {"pad_token_id": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 16},
    "mllama": {"text_config": {"pad_token_id": 0}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2],
        "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_expand": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What some families want beside small sizes."""
LOUDER = 4.0


def tiny_family_config(family: str, changes: Mapping[str, object] = MappingProxyType({})) -> PretrainedConfig:
    """The default config of a model type with small sizes, one layer of each of its kinds (at least two), and
    `changes`."""
    kind: Callable[..., PretrainedConfig] = CONFIG_MAPPING[family]
    values = merged({**small_values(kind()), **TOKENS}, SPECIAL.get(family, {})) | dict(changes)
    config = kind(**values)
    if "is_decoder" in vars(config):
        config.is_decoder = True
    return config


def tiny_family(
    family: str,
    changes: Mapping[str, object] = MappingProxyType({}),
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    seed: int = 0,
) -> PreTrainedModel:
    """A random causal language model, with weights large enough that what its layers do shows in its log-probs."""
    config = tiny_family_config(family, changes)
    remove_noise(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    make_loud(model)
    return model


@torch.no_grad()
def make_loud(model: torch.nn.Module) -> None:
    """Enlarge small random matrices, with which a model would say nearly the same of everything."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point() and float(parameter.std()) < 0.1:
            parameter.mul_(LOUDER)


def small_values(config: PretrainedConfig) -> dict[str, object]:
    """The settings of a config whose sizes are made small."""
    given = config.to_dict()
    values: dict[str, object] = {
        name: SIZES[name]
        for name, value in given.items()
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0
    }
    if "kv_lora_rank" in given and "num_key_value_heads" in values:
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            values[name] = small_values(value)
    values |= _layers(given, values)
    return values


def merged(values: Mapping[str, object], others: Mapping[str, object]) -> dict[str, object]:
    """`values` with `others` in their place, also within parts of a config."""
    both: dict[str, object] = {**values}
    for name, other in others.items():
        part = both.get(name)
        both[name] = merged(part, other) if isinstance(part, dict) and isinstance(other, dict) else other
    return both


def _layers(given: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object]:
    types = given.get("layer_types")
    if not isinstance(types, list) or not types:
        return {}
    kinds = list(dict.fromkeys(types))
    chosen = kinds if len(kinds) > 1 else kinds * 2
    return {"layer_types": chosen, **{name: len(chosen) for name in ("num_hidden_layers", "n_layer") if name in values}}
