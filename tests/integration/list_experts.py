"""A mixture of experts as models with code of their own have it: experts in a list, of which a pass calls those that
some token has chosen. Importing this file registers it with transformers."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.tiny_models import tiny_config

NUM_EXPERTS = 4


class ListExpertsConfig(LlamaConfig):
    """Llama's settings."""

    model_type = "list_experts"


class ListExperts(nn.Module):
    """Each token goes through one expert."""

    def __init__(self, config: ListExpertsConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(NUM_EXPERTS)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.gate(hidden).softmax(-1).max(-1)
        outputs = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            places = chosen == index
            if places.any():
                outputs[places] = shares[places][:, None] * expert(hidden[places])
        return outputs


class ListExpertsForCausalLM(LlamaForCausalLM):
    """Llama with experts."""

    config_class = ListExpertsConfig

    def __init__(self, config: ListExpertsConfig) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        for layer in self.model.layers:
            layer.mlp = ListExperts(config)
        self.post_init()  # type: ignore[no-untyped-call]


AutoConfig.register("list_experts", ListExpertsConfig)
AutoModelForCausalLM.register(ListExpertsConfig, ListExpertsForCausalLM)


def list_experts() -> ListExpertsForCausalLM:
    """A tiny random model."""
    settings = {name: value for name, value in tiny_config().to_dict().items() if name != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ListExpertsForCausalLM(ListExpertsConfig(**settings))
