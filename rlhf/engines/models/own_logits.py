"""A model's own code from its last hidden states to logits, whatever it does there: scaling, caps, more layers.

The model's own forward runs with a stand-in for its backbone, which returns the hidden states that are given.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


@dataclass
class _Given(ModelOutput):
    """What a backbone returns. Only the hidden states are there; anything else is None."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenHidden(nn.Module):
    """Stands in for a backbone and for every module in it; other attributes are the backbone's own."""

    def __init__(self, backbone: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.held = (backbone, hidden)  # in a tuple, so that the backbone is no submodule

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.held[0], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *_: object, **__: object) -> ModelOutput:
        return _Given(last_hidden_state=self.held[1][None])


class _OutputLayer(nn.Module):
    """A linear layer whose parameters belong to another module."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.held = (weight, bias)

    @property
    def weight(self) -> torch.Tensor:
        return self.held[0]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.held[1]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, *self.held)


def backbone(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a model below its head, a child, and its name. Some classes name a child that only a larger model
    has (Llama 4)."""
    children = dict(model.named_children())
    name = next((name for name in (model.base_model_prefix, "model", "transformer") if name in children), "")
    return name, children[name] if name else model


def own_logits(
    model: PreTrainedModel, head_name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[n, d] -> logits [n, vocabulary] by the forward of `model`, with `weight` and `bias` in its output layer, a child
    called `head_name`. In float32, or float64 where the hidden states are."""
    stand_in, (name, below) = copy.copy(model), backbone(model)
    stand_in.__dict__["_modules"] = {
        **model._modules,
        name: _GivenHidden(below, hidden),
        head_name: _OutputLayer(weight, bias),
    }
    token_ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    logits: torch.Tensor = stand_in(input_ids=token_ids, use_cache=False).logits[0]
    return logits if hidden.dtype == torch.float64 else logits.float()
