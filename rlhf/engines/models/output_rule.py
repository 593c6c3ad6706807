"""Finds how a model turns its output layer's products into logits: by trying what its config may mean."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.engines.models.heads import LogProbHead
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.own_logits import own_logits
from rlhf.engines.models.packed import PackedInput

WORDS = ("logit", "lm_head", "soft_cap", "mup", "dim_model_base")
"""Words in the names of settings that scale or cap logits. Families disagree about names, and about whether a number
multiplies (Cohere's logit_scale, HyperCLOVA X's logits_scaling) or divides (Granite's logits_scaling)."""
LARGE_LOGIT = 40.0
"""Large enough to show a cap, which leaves small logits as they are."""
ROWS = 2
"""Tokens that are tried: each has a logit for every word of the vocabulary."""
CLOSE = 1e-6
"""Share of the largest logit: float32 heads round to less."""


def find_rule(
    model: PreTrainedModel,
    head_name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rule: LogitsRule,
) -> LogitsRule | None:
    """The rule, at the temperature and with the chunks of `rule`, that gives the log-probs of the model's own code for
    `hidden` [n, d]. None if no rule does."""
    hidden = hidden[:: max(1, len(hidden) // ROWS)]
    plain = LogitsRule().forward(hidden, weight, bias).abs().max().clamp(min=1e-6)
    rows = torch.cat([hidden, hidden * (LARGE_LOGIT / plain).to(hidden.dtype)])
    logits = own_logits(model, head_name, rows, weight, bias).float()
    own, allowed = logits.log_softmax(-1), CLOSE * max(float(logits.abs().max()), 10.0)
    for scale, softcap in dict.fromkeys(_candidates(model.config)):
        tried = LogitsRule(scale=scale, softcap=softcap).forward(rows, weight, bias).log_softmax(-1)
        difference = float((tried - own).abs().max())
        if difference <= allowed:
            return replace(rule, scale=scale, softcap=softcap)
    return None


def _candidates(config: PretrainedConfig) -> Iterator[tuple[float, float]]:
    """Pairs of scale and softcap, the likeliest first."""
    text = config.get_text_config().to_dict()
    numbers = dict.fromkeys(_numbers(text))
    scales = [1.0, *(one for number in numbers for one in (number, 1.0 / number))]
    if (base := text.get("dim_model_base")) and (width := text.get("hidden_size")):
        scales.append(base / width)
    for cap in (0.0, *numbers):
        for scale in scales:
            yield scale, cap


def _numbers(values: Mapping[str, Any]) -> Iterator[float]:
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value > 0 and any(word in name for word in WORDS):
            yield float(value)


class RuleFinder(nn.Module):
    """Stands in for a `LogProbHead` in one pass, and finds its rule."""

    def __init__(self, head: LogProbHead, model: PreTrainedModel, head_name: str) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.rule: LogitsRule | None = head.rule
        self._model = (model,)  # in a tuple, so that it is no submodule
        self._head_name = head_name

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """Returns zeros."""
        assert self.rule is not None
        self.rule = find_rule(self._model[0], self._head_name, hidden, self.weight, self.bias, self.rule)
        return hidden.new_zeros(1, len(packed.token_ids))
