"""The heads on top of the backbone: token log-probs, token values, or a score for each sequence or each token.

A head owns the parameter of the layer that it replaces (`lm_head` or `score`), under the same name. So names stay
Hugging Face's, tied embeddings stay tied, and ZeRO-3's module hooks gather the weight once when the head runs, however
many chunks it uses.

A head gets the hidden states of the whole batch, or those from token `start` on that one rank of a group computes
(`sequence_parallel.py`); what it returns is 0 where other ranks know the output, so that the sum over the ranks is the
output of the batch.

Each head returns one tensor. ZeRO-3 tracks a module's outputs one by one through the backward pass, and ranks whose
losses use different outputs (padding needs no entropy) would wait for each other forever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.engines.models.log_probs import LogitsRule, token_log_probs
from rlhf.engines.models.own_logits import own_logits
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import PackedPass, SequencePasses
from rlhf.errors import ModelError
from rlhf.types import Head


class LogProbHead(nn.Module):
    """Replaces `lm_head`: gives log-probs and entropies of the batch's own tokens instead of logits."""

    def __init__(self, lm_head: nn.Linear, rule: LogitsRule) -> None:
        super().__init__()
        self.weight = lm_head.weight
        self.bias: nn.Parameter | None = lm_head.bias
        self.rule = rule

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [2, T]: log-probs and entropies, aligned with the tokens; 0 at each sequence's first token, and at
        tokens that are not `wanted`."""
        targets = packed.token_ids[packed.wanted]
        rows = hidden[packed.wanted - 1 - packed.start]
        rule = self.rule if packed.temperature is None else replace(self.rule, temperature=packed.temperature)
        known = torch.stack(token_log_probs(rows, self.weight, self.bias, targets, rule))
        return known.new_zeros(2, len(packed.token_ids)).index_copy(1, packed.wanted, known)


class OwnLogProbHead(nn.Module):
    """Replaces `lm_head` where the model does more to its logits than a `LogitsRule` says: the model's own code runs,
    on a chunk of tokens at a time, and again in the backward pass."""

    def __init__(self, head: LogProbHead, model: PreTrainedModel, head_name: str) -> None:
        super().__init__()
        self.weight, self.bias, self.rule = head.weight, head.bias, head.rule
        self._model = (model,)  # in a tuple, so that it is no submodule
        self._head_name = head_name

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """As `LogProbHead.forward`."""
        temperature = self.rule.temperature if packed.temperature is None else packed.temperature
        parts = [
            checkpoint(
                self._chunk,
                hidden[wanted - 1 - packed.start],
                packed.token_ids[wanted],
                temperature,
                use_reentrant=False,
            )
            for wanted in packed.wanted.split(self.rule.chunk_tokens)
        ]
        known = torch.cat(parts, dim=1)
        return known.new_zeros(2, len(packed.token_ids)).index_copy(1, packed.wanted, known)

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        wide = self.rule.widened
        bias = None if self.bias is None else wide(self.bias)
        logits = own_logits(self._model[0], self._head_name, wide(hidden), wide(self.weight), bias)
        log_p = (logits.float() / temperature).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return torch.stack([log_p.gather(-1, targets[:, None]).squeeze(-1), entropy])


class ValueHead(nn.Module):
    """Replaces `score`: the value of the state before each token."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [1, T]: entry t is the output at token t-1; 0 at each sequence's first token."""
        values = self.weight.float() @ hidden[packed.predicted - 1 - packed.start].float().T
        return values.new_zeros(1, len(packed.token_ids)).index_copy(1, packed.predicted, values)


class ScoreHead(nn.Module):
    """Replaces `score`: one score for each sequence, read at its last token."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [1, S]."""
        scores = self.weight.float() @ hidden[packed.last - packed.start].float().T
        return scores.new_zeros(1, packed.num_sequences).index_copy(1, packed.ending, scores)


class TokenScoreHead(nn.Module):
    """Replaces `score`: one score for each token, read at the token itself."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [1, T]."""
        scores = self.weight.float() @ hidden.float().T
        scores = scores if self.bias is None else scores + self.bias.float()
        before, after = packed.start, len(packed.token_ids) - packed.start - len(hidden)
        return nn.functional.pad(scores, (before, after)) if before or after else scores


class PackedModel(nn.Module):
    """A Hugging Face model whose forward pass takes a packed batch and ends in one of the heads."""

    def __init__(self, model: PreTrainedModel, head: Head, rule: LogitsRule, *, where: str = "model") -> None:
        """Raises ModelError, which begins with `where`, if the model has no such head."""
        super().__init__()
        name = "lm_head" if head is Head.LOG_PROBS else "score"
        layer = dict(model.named_children()).get(name)
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"{where}: a {type(model).__name__} has no linear output layer called {name}.")
        heads: dict[Head, nn.Module] = {
            Head.LOG_PROBS: LogProbHead(layer, rule),
            Head.VALUES: ValueHead(layer),
            Head.SCORES: ScoreHead(layer),
            Head.TOKEN_SCORES: TokenScoreHead(layer.weight, layer.bias),
        }
        model.set_submodule(name, heads[head])
        self.model = model
        self.head_kind = head
        self.head_name = name
        self.passes: SequencePasses = PackedPass()
        self._own_layer = (layer,)  # in a tuple, so that it is no submodule

    def forward(self, packed: PackedInput) -> torch.Tensor:
        """The head's outputs, float32: [1, T], or [1, S] scores; for log-probs [2, T], the second row the entropy."""
        return self.passes.outputs(self.model, self.head, packed)

    @property
    def head(self) -> nn.Module:
        """The head that computes now."""
        return self.model.get_submodule(self.head_name)

    def set_head(self, head: nn.Module) -> None:
        """Compute with another head from now on."""
        self.model.set_submodule(self.head_name, head)

    @contextmanager
    def own_forward(self) -> Iterator[PreTrainedModel]:
        """The model as transformers built it, with its own output layer, inside this block."""
        (layer,), head = self._own_layer, self.head
        for name, parameter in head.named_parameters():
            setattr(layer, name, parameter)
        self.set_head(layer)
        try:
            yield self.model
        finally:
            self.set_head(head)
