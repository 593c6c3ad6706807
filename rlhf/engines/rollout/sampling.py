"""Samples tokens in such a way that only a request's seed decides them.

Token t of a request is drawn by inverse-CDF sampling with the t-th uniform number of a generator seeded by the request:
the other requests of the batch have no influence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.types import RolloutRequest


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each of B rows is sampled: temperature [B, 1] (0: greedy), top_k [B, 1] (0: all), top_p [B, 1], and
    uniforms [B, T] in [0, 1), one for each token."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniforms: torch.Tensor

    @staticmethod
    def of(requests: Sequence[RolloutRequest], device: torch.device) -> "SamplingRows":
        """One row for each request."""
        longest = max(request.sampling.max_tokens for request in requests)
        uniforms = np.stack([np.random.default_rng(request.seed).random(longest) for request in requests])
        return SamplingRows(
            temperature=torch.tensor([[float(r.sampling.temperature)] for r in requests], device=device),
            top_k=torch.tensor([[r.sampling.top_k] for r in requests], device=device),
            top_p=torch.tensor([[float(r.sampling.top_p)] for r in requests], device=device),
            uniforms=torch.from_numpy(uniforms).to(device),
        )

    def select(self, rows: torch.Tensor) -> "SamplingRows":
        """The rows with these indices."""
        return SamplingRows(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.uniforms[rows])

    def draw(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B] for logits [B, V], and their log-probs [B] under logits / temperature.

        The log-probs are those of the full distribution, before top-k and top-p: what a trainer computes for the same
        tokens. Those of a greedy row are at temperature 1.
        """
        greedy = self.temperature == 0
        log_probs = torch.log_softmax(logits.float() / torch.where(greedy, 1.0, self.temperature), dim=-1)
        probs = self._filter(log_probs.exp())
        cumulative = probs.double().cumsum(-1)
        total = cumulative[:, -1:]
        # Strictly below the total, even after rounding: so the token that is found has a probability above 0.
        targets = torch.minimum(self.uniforms[:, step : step + 1] * total, total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulative, targets, right=True)
        tokens = torch.where(greedy, logits.argmax(-1, keepdim=True), drawn)
        return tokens[:, 0], log_probs.gather(-1, tokens)[:, 0]

    def _filter(self, probs: torch.Tensor) -> torch.Tensor:
        """Zero the tokens outside top-k, then those outside the smallest set with probability top-p of the rest."""
        if bool((self.top_k == 0).all()) and bool((self.top_p >= 1).all()):
            return probs
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(probs.shape[-1], device=probs.device)
        ordered = ordered.masked_fill((self.top_k > 0) & (ranks >= self.top_k), 0.0)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill((self.top_p < 1) & (before >= self.top_p * ordered.sum(-1, keepdim=True)), 0.0)
        return torch.zeros_like(probs).scatter_(-1, order, ordered)
