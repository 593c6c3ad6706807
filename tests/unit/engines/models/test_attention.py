"""Which attention a model computes with."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf.config.models import AttentionName
from rlhf.engines.models import attention
from rlhf.engines.models.attention import FLASH, PACKED_SDPA, choose_attention

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class WithoutFlash(LlamaForCausalLM):
    """As Llama 4 is."""

    _supports_flash_attn = False


class WithoutBoth(WithoutFlash):
    _supports_sdpa = False


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "model_class", "chosen"),
    [
        ("auto", GPU, torch.bfloat16, LlamaForCausalLM, FLASH),
        ("auto", GPU, torch.bfloat16, None, FLASH),
        ("auto", GPU, torch.float32, LlamaForCausalLM, PACKED_SDPA),
        ("auto", CPU, torch.bfloat16, LlamaForCausalLM, PACKED_SDPA),
        ("auto", GPU, torch.bfloat16, WithoutFlash, PACKED_SDPA),
        ("auto", GPU, torch.bfloat16, WithoutBoth, "eager"),
        ("flash_attention_2", GPU, torch.bfloat16, WithoutFlash, FLASH),
        ("eager", GPU, torch.bfloat16, LlamaForCausalLM, "eager"),
    ],
)
def test_auto_takes_the_fastest_that_the_class_has(
    asked: AttentionName,
    device: torch.device,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    config = LlamaConfig(num_hidden_layers=1)
    assert choose_attention(asked, config, device, dtype, model_class) == chosen
