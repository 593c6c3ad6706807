"""A model that only runs forward: a reference or a reward model."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from rlhf.engines.models.chunked_mlp import chunk_feed_forward
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.loading import choose_dtype
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.pooled import PooledModel
from rlhf.engines.models.routers import set_up_routers
from rlhf.engines.models.text_pairs import separator_of
from rlhf.engines.process.distributed import deepspeed, torch_device
from rlhf.engines.training.examined import examine
from rlhf.engines.training.optimizer import scoring_config
from rlhf.engines.training.partitioned_loading import load_on_rank_zero, partition, replicate
from rlhf.engines.training.specs import ScorerSpec
from rlhf.types import FloatArray, Head, PackedTokens

CHUNK_TOKENS = 1024


class ScoringEngine:
    """One rank of a `TokenScorer`. ZeRO-3 partitions the parameters; in other stages each rank holds a full copy."""

    def __init__(self, spec: ScorerSpec, *, device: str, where: str = "model") -> None:
        """Load `spec.model` on `device` (cpu, cuda), in the process group that `init_distributed` entered. Raises
        ModelError, whose lines begin with `where`."""
        section = spec.section
        self.num_ranks = dist.get_world_size()
        self._device = torch_device(device)
        loaded = load_on_rank_zero(
            section, spec.model, spec.head, where=where, device=self._device, seed=spec.seed, new_head=False
        )
        chunk_feed_forward(loaded.model, section, where)
        self._model: torch.nn.Module
        if spec.head is Head.SCORES and "score" not in dict(loaded.model.named_children()):
            # An encoder is small: every rank holds all of it, whatever the stage.
            pooled = PooledModel(loaded.model, separator=separator_of(loaded.folder)).requires_grad_(False)
            replicate(pooled, self._device)
            self._model = pooled.eval()
            self.self_test = pooled.examine(where)
            return
        set_up_routers(loaded.model, section, where)
        rule = LogitsRule(temperature=spec.temperature, chunk_tokens=CHUNK_TOKENS, float32=section.float32_head)
        packed_model = PackedModel(loaded.model, spec.head, rule, where=where).requires_grad_(False)
        self._model = packed_model.eval()
        dtype = choose_dtype(section, self._device, where)
        is_partitioned = section.stage_on(self.num_ranks, is_float32=dtype == torch.float32) == 3
        config = scoring_config(section, dtype, self._device)
        if is_partitioned:
            partition(packed_model, self._device, config, hpz_size=section.zero_hpz_partition_size)
        else:
            replicate(packed_model, self._device)
        self.self_test = examine(packed_model, section, dtype=dtype, device=self._device, where=where)
        # The test runs in training mode, too. DeepSpeed's hooks come after it.
        if is_partitioned:
            self._model, _, _, _ = deepspeed.initialize(model=packed_model, config=config)

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """The head's outputs for each of this rank's micro-batches: [T] log-probs or values, or [S] scores."""
        return [self._model(PackedInput.from_numpy(batch, self._device))[0].cpu().numpy() for batch in batches]
