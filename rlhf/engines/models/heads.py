"""The heads on top of the backbone: token log-probs, token values, or a score for each sequence or each token.

A head owns the parameter of the layer that it replaces (`lm_head` or `score`), under the same name. So names stay
Hugging Face's, tied embeddings stay tied, and ZeRO-3's module hooks gather the weight once when the head runs, however
many chunks it uses.

Each head returns one tensor. ZeRO-3 tracks a module's outputs one by one through the backward pass, and ranks whose
losses use different outputs (padding needs no entropy) would wait for each other forever.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.engines.models.attention import PACKED_SDPA
from rlhf.engines.models.log_probs import LogitsRule, token_log_probs
from rlhf.types import Head, PackedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInput:
    """A packed batch of T tokens in S sequences, on its device. The sequences are laid end to end without padding;
    `lengths` gives their sizes (whose running sum is `cu_seqlens`).

    `predicted` are the indices of the tokens that have a predecessor (all but each sequence's first), `wanted` those of
    them whose log-probs are needed, `last` [S] those of each sequence's last token. `temperature`: see `PackedTokens`.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    predicted: torch.Tensor
    wanted: torch.Tensor
    last: torch.Tensor
    lengths: list[int]
    temperature: float | None

    @classmethod
    def from_numpy(cls, tokens: PackedTokens, device: torch.device) -> "PackedInput":
        """Copy a packed batch to `device`."""
        positions = tokens.position_ids
        predicted = positions > 0
        wanted = predicted if tokens.wanted is None else predicted & tokens.wanted
        return cls(
            token_ids=torch.tensor(tokens.token_ids, device=device),
            position_ids=torch.tensor(positions, device=device),
            predicted=torch.tensor(predicted.nonzero()[0], device=device),
            wanted=torch.tensor(wanted.nonzero()[0], device=device),
            last=torch.tensor(tokens.lengths.cumsum() - 1, device=device),
            lengths=tokens.lengths.tolist(),
            temperature=tokens.temperature,
        )


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
        rows = hidden[packed.wanted - 1]
        rule = self.rule if packed.temperature is None else replace(self.rule, temperature=packed.temperature)
        known = torch.stack(token_log_probs(rows, self.weight, self.bias, targets, rule))
        return known.new_zeros(2, len(hidden)).index_copy(1, packed.wanted, known)


class ValueHead(nn.Module):
    """Replaces `score`: the value of the state before each token."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [1, T]: entry t is the output at token t-1; 0 at each sequence's first token."""
        values = self.weight.float() @ hidden[packed.predicted - 1].float().T
        return values.new_zeros(1, len(hidden)).index_copy(1, packed.predicted, values)


class ScoreHead(nn.Module):
    """Replaces `score`: one score for each sequence, read at its last token."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [1, S]."""
        return self.weight.float() @ hidden[packed.last].float().T


class TokenScoreHead(nn.Module):
    """Replaces `score`: one score for each token, read at the token itself."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight
        self.bias: nn.Parameter | None = score.bias

    def forward(self, hidden: torch.Tensor, packed: PackedInput) -> torch.Tensor:
        """[T, d] -> [1, T]."""
        scores = self.weight.float() @ hidden.float().T
        return scores if self.bias is None else scores + self.bias.float()


class PackedModel(nn.Module):
    """A Hugging Face model whose forward pass takes a packed batch and ends in one of the heads."""

    def __init__(self, model: PreTrainedModel, head: Head, rule: LogitsRule) -> None:
        super().__init__()
        name = "lm_head" if head is Head.LOG_PROBS else "score"
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}, not a linear layer")
        heads: dict[Head, nn.Module] = {
            Head.LOG_PROBS: LogProbHead(layer, rule),
            Head.VALUES: ValueHead(layer),
            Head.SCORES: ScoreHead(layer),
            Head.TOKEN_SCORES: TokenScoreHead(layer),
        }
        model.set_submodule(name, heads[head])
        self.model = model
        self.head_name = name
        self.kernel_needs_lengths = model.config._attn_implementation == PACKED_SDPA

    def forward(self, packed: PackedInput) -> torch.Tensor:
        """The head's outputs, float32: [1, T], or [1, S] scores; for log-probs [2, T], the second row the entropy."""
        backbone = self.model.base_model(
            input_ids=packed.token_ids[None],
            position_ids=packed.position_ids[None],
            attention_mask=None,
            use_cache=False,
            **({"sequence_lengths": packed.lengths} if self.kernel_needs_lengths else {}),
        )
        outputs: torch.Tensor = self.model.get_submodule(self.head_name)(backbone.last_hidden_state[0], packed)
        return outputs
