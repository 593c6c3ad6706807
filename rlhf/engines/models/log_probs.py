"""Log-probabilities and entropy of given tokens, from logits of which only a chunk of rows is in memory at a time.

The simple way holds the logits, their float32 copy, the log-softmax and its gradient: four [T, vocabulary] matrices.
Here a chunk of rows is computed, reduced and discarded, and computed again in the backward pass. If the matrix of
log-probs is small (`LogitsRule.kept_bytes`) it is kept instead, which saves the second matrix product. Everything after
the product is float32.
"""

from dataclasses import dataclass, replace

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import log_softmax

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRule:
    """How hidden states become the logits that tokens are sampled from. The only place that divides by temperature.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature; softcap 0 means no cap.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0
    chunk_tokens: int = 1024
    kept_bytes: int = 0
    """Largest matrix of log-probs [n, vocabulary] that is kept for the backward pass."""
    float32: bool = False
    """Multiply in float32 where the model is in a coarser format."""

    def widened(self, tensor: torch.Tensor) -> torch.Tensor:
        """A factor of the matrix product, in the format of that product."""
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if self.float32 else tensor

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[n, hidden] -> float32 logits [n, vocabulary]."""
        offset = None if bias is None else self.widened(bias)
        logits = torch.nn.functional.linear(self.widened(hidden), self.widened(weight), offset).float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return logits

    @property
    def constant_slope(self) -> float:
        """The derivative of each logit with respect to the matrix product's result, without the softcap's factor."""
        return self.scale / self.temperature

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of each logit with respect to the matrix product's result."""
        if not self.softcap:
            return self.constant_slope
        saturation = (logits * (self.temperature / self.softcap)).square_()
        return saturation.neg_().add_(1.0).mul_(self.constant_slope)


class _TokenLogProbs(torch.autograd.Function):
    """[n] log-probabilities and [n] entropies."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rule: LogitsRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        keeps = not rule.softcap and 4 * len(targets) * len(weight) <= rule.kept_bytes
        kept = []
        for rows in _chunks(len(targets), rule.chunk_tokens):
            log_p = log_softmax(rule.forward(hidden[rows], weight, bias), -1)
            log_probs[rows] = log_p.gather(-1, targets[rows, None]).squeeze(-1)
            entropy[rows] = -log_p.exp().mul_(log_p).sum(-1)
            if keeps:
                kept.append(log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *kept)  # type: ignore[arg-type]
        ctx.rule = rule  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Gradients:
        hidden, weight, bias, targets, entropy, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        rule: LogitsRule = ctx.rule  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden)
        learns = ctx.needs_input_grad[1]  # type: ignore[attr-defined]  # not with LoRA
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        slope: torch.Tensor | float = rule.constant_slope
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None  # entropy is only logged: this saves three passes over the matrix
        for index, rows in enumerate(_chunks(len(targets), rule.chunk_tokens)):
            if kept:
                log_p = kept[index]
            else:
                logits = rule.forward(hidden[rows], weight, bias)
                slope, log_p = rule.slope(logits), log_softmax(logits, -1)
                del logits
            p = log_p.exp()
            # d H / d z_j = -p_j * (log p_j + H);  d log p_y / d z_j = [j = y] - p_j
            factor = torch.zeros_like(entropy[rows, None]) if grad_log_probs is None else -grad_log_probs[rows, None]
            if grad_entropy is None:
                grad = p.mul_(factor)
            else:
                excess = log_p + entropy[rows, None] if kept else log_p.add_(entropy[rows, None])
                grad = excess.mul_(-grad_entropy[rows, None]).add_(factor).mul_(p)
                del excess
            grad.scatter_add_(-1, targets[rows, None], -factor)
            if not (isinstance(slope, float) and slope == 1.0):
                grad.mul_(slope)
            factors = rule.widened(hidden[rows]), rule.widened(weight)
            grad = grad.to(factors[1].dtype)
            grad_hidden[rows] = (grad @ factors[1]).to(hidden.dtype)
            if grad_weight is None:
                pass
            elif grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, factors[0])
            else:
                grad_weight += grad.T @ factors[0]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del log_p, p, grad, factors  # else they would be in memory beside the next chunk's
        cast_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        cast_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, cast_weight, cast_bias, None, None


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rule: LogitsRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and entropy of the distribution that it was drawn from; nats, float32.

    `hidden` [n, d] and `weight` [vocabulary, d] are in the model's dtype, `targets` is [n]. Both outputs are [n], and
    differentiable with respect to hidden, weight and bias.
    """
    if not torch.is_grad_enabled():
        rule = replace(rule, kept_bytes=0)
    log_probs, entropy = _TokenLogProbs.apply(hidden, weight, bias, targets, rule)  # type: ignore[no-untyped-call]
    return log_probs, entropy


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    return [slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows)]
