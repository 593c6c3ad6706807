"""Attention over a packed batch that costs the sum of the squared sequence lengths, not the square of their sum.

Transformers' own sdpa masks a packed batch with one [T, T] mask. Here each sequence has a causal kernel call of its own
and there is no mask, as in variable-length flash attention (`cu_seqlens`) on GPUs.
"""

from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from rlhf.config.model_files import caps_scores
from rlhf.config.models import AttentionName

PACKED_SDPA = "rlhf_packed_sdpa"
FLASH: Final = "flash_attention_2"


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: list[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of the packed sequences; with a sliding window w, to the last w tokens only.

    `query` [1, heads, T, d]; `key` and `value` may have fewer heads (grouped queries). Returns [1, T, heads, d].
    """
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:
        key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    parts = zip(*(torch.split(x, sequence_lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [_causal(q, k, v, scaling, sliding_window or q.shape[2]) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int
) -> torch.Tensor:
    """[1, heads, n, d] of one sequence. Queries go in blocks as long as the window: each sees two blocks of keys."""
    size = query.shape[2]
    if size <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    outputs = []
    for start in range(0, size, window):
        stop, first = min(start + window, size), max(0, start - window + 1)
        ages = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(first, stop, device=query.device)
        seen = (ages >= 0) & (ages < window)
        keys, values = key[:, :, first:stop], value[:, :, first:stop]
        outputs.append(
            scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=seen, scale=scaling)
        )
    return torch.cat(outputs, dim=2)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)


def choose_attention(
    asked: AttentionName,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None,
) -> str:
    """The name of the attention implementation for transformers.

    auto is flash_attention_2 on a GPU where it is installed, except for float32, which it does not support, and for a
    `model_class` without it; else sdpa, or eager for a class that has none or a model that caps attention scores, which
    sdpa cannot. A model with code of its own (None) is taken to have both. With sdpa, models with plain causal
    attention use the packed kernel; others (a sliding window, for example) use transformers' own.
    """
    if asked == "auto":
        has_flash = model_class is None or model_class._supports_flash_attn
        has_sdpa = (model_class is None or model_class._supports_sdpa) and not caps_scores(config.to_dict())
        can_flash = device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available()
        asked = FLASH if has_flash and can_flash else "sdpa" if has_sdpa else "eager"
    return PACKED_SDPA if asked == "sdpa" and is_plain_causal(config) else asked


def alternatives(asked: AttentionName, chosen: str) -> list[str]:
    """The implementations that may compute, the fastest first: for auto `chosen` and what is slower; else only
    `chosen`."""
    slower = {FLASH: ["sdpa", "eager"], "sdpa": ["eager"], PACKED_SDPA: ["sdpa", "eager"]}
    return [chosen, *(slower.get(chosen, []) if asked == "auto" else [])]


def is_plain_causal(config: PretrainedConfig) -> bool:
    """Whether, by the model's config, every layer attends to all earlier tokens and to nothing else."""
    values = config.to_dict()
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    layers = set(values.get("layer_types") or ())
    return values.get("model_type") in PLAIN_CAUSAL and not window and layers <= {"full_attention"}


PLAIN_CAUSAL = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo", "olmo2", "smollm3", "phi3"}
)
"""Model types whose attention passes keyword arguments on from the model's forward, and does nothing special."""
