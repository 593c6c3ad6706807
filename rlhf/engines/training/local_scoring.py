"""A model that only runs forward, in this process alone: a reward model for a command without Ray."""

from collections.abc import Sequence

import torch

from rlhf.config.models import ModelSection
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.loading import choose_dtype, load_model
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import own_pace
from rlhf.engines.models.pooled import PooledModel
from rlhf.engines.models.self_test import Examination
from rlhf.engines.models.text_pairs import separator_of
from rlhf.types import FloatArray, Head, PackedTokens

CHUNK_TOKENS = 1024


class LocalScorer:
    """Implements `TokenScorer` as one rank, without a process group."""

    num_ranks = 1

    def __init__(self, section: ModelSection, model: str, head: Head, *, device: str, where: str = "model") -> None:
        """Load `model` on `device` (cpu, cuda). Raises ModelError."""
        self._device = torch.device(device)
        self._model: torch.nn.Module
        loaded = load_model(section, model, head, where=where, device=self._device, seed=0, new_head=False)
        if head is Head.SCORES and "score" not in dict(loaded.model.named_children()):
            pooled = PooledModel(loaded.model, separator=separator_of(loaded.folder)).requires_grad_(False)
            self._model = pooled.to(self._device).eval()
            self.self_test = pooled.examine(where)
            return
        rule = LogitsRule(temperature=1.0, chunk_tokens=CHUNK_TOKENS)
        packed_model = PackedModel(loaded.model, head, rule, where=where).requires_grad_(False).to(self._device)
        self._model = packed_model.eval()
        self.self_test = Examination(
            packed_model=packed_model,
            asked=section.attention,
            dtype=choose_dtype(section, self._device, where),
            device=self._device,
            where=where,
            agree=float,
            pace=own_pace,
        ).run()

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `TokenScorer.forward`."""
        return [self._model(PackedInput.from_numpy(batch, self._device))[0].cpu().numpy() for batch in batches]
