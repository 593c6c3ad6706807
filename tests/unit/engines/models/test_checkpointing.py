"""Layers that are computed again in the backward pass, and where what they are computed from is kept."""

from typing import cast

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.config.models import TrainedModelSection
from rlhf.engines.models import checkpointing
from rlhf.engines.models.checkpointing import checkpoint_layers
from rlhf.errors import ModelError
from tests.families import tiny_family

TOKENS = torch.arange(4, 23)[None]
WHERE = "policy.model"


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    loss = model.train()(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[0, :, 7].sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_the_layers_inputs_are_what_is_kept_elsewhere(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Size] = []
    pinned: list[bool] = []

    class Recorder(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *, pin_memory: bool) -> None:
            pinned.append(pin_memory)
            super().__init__(self.pack, lambda tensor: tensor)

        def pack(self, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel():
                kept.append(tensor.shape)
            return tensor

    monkeypatch.setattr(checkpointing, "save_on_cpu", Recorder)
    model = tiny_family(family)
    section = TrainedModelSection(gradient_checkpointing="offload")
    checkpoint_layers(model, section, WHERE, on_gpu=True)
    gradients(model)
    num_layers = cast(int, model.config.num_hidden_layers)
    assert kept == [(1, TOKENS.shape[1], 64)] * num_layers
    assert pinned == [True] * num_layers


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_gradients_keep_their_bits(family: str) -> None:
    found = []
    for how in (False, True, "offload"):
        model = tiny_family(family)
        checkpoint_layers(
            model, TrainedModelSection.model_validate({"gradient_checkpointing": how}), WHERE, on_gpu=False
        )
        found.append(gradients(model))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_model_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, section = tiny_family("llama"), TrainedModelSection(gradient_checkpointing="offload")
    monkeypatch.setattr(type(model), "gradient_checkpointing_enable", lambda *_: None)  # calls torch by itself
    with pytest.raises(ModelError, match=r"^policy.gradient_checkpointing: a LlamaForCausalLM decides by itself"):
        checkpoint_layers(model, section, WHERE, on_gpu=False)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"^policy.gradient_checkpointing: a LlamaForCausalLM does not support it"):
        checkpoint_layers(model, section, WHERE, on_gpu=False)
