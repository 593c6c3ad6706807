"""Tiny random checkpoints of families that people train, whole: with the towers of those that read images."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from rlhf.engines.models.noise import remove_noise
from rlhf.engines.models.text_part import language_model_class
from tests.families import make_loud, small_values, tiny_family_config
from tests.tiny_models import tiny_tokenizer

TEXT = {
    **{"vocab_size": 128, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    "max_position_embeddings": 512,
}
"""As vLLM's attention on a CPU wants heads, and as many tokens as the tokenizer has."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {"linear_num_value_heads": 4}
WIDE_LINEAR: Mapping[str, int] = MappingProxyType({"linear_key_head_dim": 64, "linear_value_head_dim": 64})
"""Changes of families with linear attention, whose heads then are as vLLM's kernel on a CPU wants them."""
FAMILIES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": EXPERTS,
        "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},
        "qwen3_5_text": LINEAR,
        "qwen3_5": LINEAR,
        "qwen3_5_moe": LINEAR,
        "gemma3": {},
        "mistral3": {},
        "llama4": {},
    }
)
"""Settings of the text part beside `TEXT`."""


def write_family(folder: Path, family: str, changes: Mapping[str, int] = MappingProxyType({})) -> Path:
    """Write a random model of one of `FAMILIES` with its tokenizer to `folder`; `changes` are of its text part."""
    config = _config(family, {**TEXT, **FAMILIES[family], **changes})
    remove_noise(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = language_model_class(config).from_config(config)  # type: ignore[no-untyped-call]
    make_loud(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _config(family: str, of_text: Mapping[str, object]) -> PretrainedConfig:
    whole = CONFIG_MAPPING[family]()
    if whole.get_text_config() is whole:
        return tiny_family_config(family, of_text)
    values = small_values(whole)
    text = whole.get_text_config().to_dict()
    changes = {name: value for name, value in of_text.items() if name in text}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values["text_config"] = {**values["text_config"], **changes, **ends}  # type: ignore[dict-item]
    return CONFIG_MAPPING[family](**values)  # type: ignore[arg-type]
