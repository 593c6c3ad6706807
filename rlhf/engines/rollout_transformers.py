"""A rollout engine on plain transformers: the default where vLLM is not installed.

The same protocol and the same tests as the vLLM engine, and simpler in every way: a call is cut into batches by its
own requests alone, so that what other threads ask for cannot change its answers.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from rlhf.config.rollout import RolloutSection
from rlhf.engines.quiet import quiet_libraries
from rlhf.engines.sampling import SamplingRows
from rlhf.engines.serving import Serving, ServingGate
from rlhf.engines.weight_sync.base import Info
from rlhf.engines.weight_sync.buckets import dtype_of
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.errors import ModelError, WeightSyncError
from rlhf.types import FinishReason, FloatArray, IntArray, PackedTokens, Rollout, RolloutRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersRolloutEngine:
    """Samples with `forward` and a KV cache, `max_num_seqs` answers at a time; receives weights through gloo.

    A request's tokens are decided by its seed. What is not ours to decide: in a batch of another shape, matrix
    products round the last bits of the logits differently (about 1e-6 in float32), which can turn a draw that falls
    on the very edge between two tokens. The same call always gives the same bits.

    Implements `RolloutEngine` and `WeightReceiver`. Consumes: requests, under a lock that one batch holds at a time.
    An update waits for the batch under way; calls wait for the end of an update.
    """

    def __init__(
        self,
        section: RolloutSection,
        model: str,
        *,
        dtype: str,
        device: str,
        name: str = "rollout-0",
        version: int = 0,
    ) -> None:
        """Load `model` (a folder or hub name) in `dtype` (float32, bfloat16) on `device` (cpu, cuda).

        `version` is the policy version of those weights.
        """
        quiet_libraries()
        self._section = section
        self._name = name
        self._device = torch.device(device)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype_of(dtype), use_safetensors=True
        )
        torch.nn.Module.eval(self._model).requires_grad_(False)
        self._move(self._device)
        self._parameters = dict(self._model.named_parameters())
        self._context = int(self._model.config.max_position_embeddings)
        self._gate = ServingGate(name, version)
        self._busy = threading.Lock()
        self._receiver: GlooReceiver | None = None
        self._expected: set[str] = set()

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        rollouts: dict[int, Rollout] = {}
        # Prompts of similar length share a batch: less padding. The order is a function of the requests alone.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_token_ids), requests[i].id, i))
        for start in range(0, len(order), self._section.max_num_seqs):
            batch = order[start : start + self._section.max_num_seqs]
            with self._turn() as version:
                answers = self._generate_batch([requests[i] for i in batch], version)
            rollouts.update(zip(batch, answers, strict=True))
        return [rollouts[i] for i in range(len(requests))]

    @torch.inference_mode()
    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `RolloutEngine.score`."""
        with self._turn():
            return [self._score(packed) for packed in sequences]

    def sleep(self) -> None:
        """Give an accelerator's memory back; on CPU only the state changes, for there is nothing to give back."""
        with self._busy:
            self._gate.sleep()
            if self._device.type == "cuda":
                self._move(torch.device("cpu"))
                torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undo `sleep`."""
        with self._busy:
            self._move(self._device)
            self._gate.wake()

    def close(self) -> None:
        """Leave the weight transfer group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def init_weight_transfer(self, init_info: Info) -> None:
        """See `WeightReceiver.init_weight_transfer`."""
        self.close()
        self._receiver = GlooReceiver(GlooInitInfo(**cast("dict[str, object]", init_info)))  # type: ignore[arg-type]

    def start_weight_update(self) -> None:
        """See `WeightReceiver.start_weight_update`."""
        with self._busy:
            self._gate.begin_update()

    def update_weights(self, update_info: Info) -> None:
        """See `WeightReceiver.update_weights`."""
        info = GlooUpdateInfo(**cast("dict[str, object]", update_info))  # type: ignore[arg-type]
        if self._receiver is None:
            raise WeightSyncError(f"engine {self._name}: no weight transfer group was joined")
        self._expected = set(self._parameters)
        try:
            digest = self._receiver.receive(info, self._load)
            if self._expected:
                missing = ", ".join(sorted(self._expected))
                raise WeightSyncError(f"engine {self._name}: version {info.version}: never sent: {missing}")
        except WeightSyncError as error:
            self._gate.refuse(error)
            raise
        self._gate.received(digest)

    def finish_weight_update(self, version: int, digest: str) -> str:
        """See `WeightReceiver.finish_weight_update`. There is no prefix cache: each batch has a KV cache of its own."""
        return self._gate.serve(version, digest)

    @contextmanager
    def _turn(self) -> Iterator[int]:
        """Hold the model while it serves; gives the version. Never waits for an update while holding it."""
        while True:
            self._gate.enter(self._section.stall_timeout_s)
            with self._busy:
                if self._gate.state is Serving.SERVING:
                    yield self._gate.version
                    return

    def _move(self, device: torch.device) -> None:
        torch.nn.Module.to(self._model, device)

    @torch.no_grad()
    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self._parameters[name].copy_(tensor)
            self._expected.discard(name)

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[RolloutRequest], version: int) -> list[Rollout]:
        prompts = [request.prompt_token_ids for request in requests]
        self._check(requests)
        limits = np.array([min(r.sampling.max_tokens, self._context - len(r.prompt_token_ids)) for r in requests])
        longest = int(limits.max())
        tokens = np.zeros((len(requests), longest), dtype=np.int64)
        log_probs = np.zeros((len(requests), longest), dtype=np.float32)
        lengths = limits.copy()
        stopped = np.zeros(len(requests), dtype=bool)

        rows = np.arange(len(requests))  # rows of the batch -> requests; rows leave when half of them have ended
        sampling = SamplingRows.of(requests, self._device)
        decoder = _Decoder(self._model, prompts, self._device)
        logits = decoder.prefill()
        for step in range(longest):
            drawn, drawn_log_probs = sampling.draw(logits, step)
            ids = drawn.cpu().numpy()
            alive = step < lengths[rows]
            tokens[rows[alive], step] = ids[alive]
            log_probs[rows[alive], step] = drawn_log_probs.cpu().numpy()[alive]
            for row in np.flatnonzero(alive):
                if int(ids[row]) in requests[rows[row]].sampling.stop_token_ids:
                    stopped[rows[row]] = True
                    lengths[rows[row]] = step + 1
            alive = step + 1 < lengths[rows]
            if not alive.any():
                break
            if 2 * alive.sum() <= len(rows):
                keep = torch.from_numpy(np.flatnonzero(alive)).to(self._device)
                rows, sampling, drawn = rows[alive], sampling.select(keep), drawn[keep]
                decoder.keep(keep)
            logits = decoder.decode(drawn)
        return [
            Rollout(
                id=request.id,
                prompt_id=request.prompt_id,
                token_ids=tokens[i, : lengths[i]],
                log_probs=log_probs[i, : lengths[i]],
                finish_reason=FinishReason.STOP if stopped[i] else FinishReason.LENGTH,
                weight_version=version,
            )
            for i, request in enumerate(requests)
        ]

    def _check(self, requests: Sequence[RolloutRequest]) -> None:
        problems = [
            f"request {r.id}: prompt of {len(r.prompt_token_ids)} tokens, need 1 to {self._context - 1}"
            for r in requests
            if not 0 < len(r.prompt_token_ids) < self._context
        ]
        if problems:
            raise ModelError(problems)

    def _score(self, packed: PackedTokens) -> FloatArray:
        scores = np.zeros(len(packed.token_ids), dtype=np.float32)
        start = 0
        for length in packed.lengths.tolist():
            ids = torch.from_numpy(packed.token_ids[start : start + length]).to(self._device)
            if length > 1:
                logits = self._model(ids[None, :-1], use_cache=False).logits[0].float()
                log_probs = torch.log_softmax(logits, dim=-1).gather(-1, ids[1:, None])[:, 0]
                scores[start + 1 : start + length] = log_probs.cpu().numpy()
            start += length
        return scores


class _Decoder:
    """A batch of B prompts, padded on the left, and the KV cache of what was decoded."""

    def __init__(
        self,
        model: "PreTrainedModel",
        prompts: Sequence[IntArray],
        device: torch.device,
    ) -> None:
        width = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        self._model = model
        self._ids = torch.from_numpy(ids).to(device)
        self._mask = torch.from_numpy(mask).to(device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)
        self._cache = DynamicCache(config=model.config)

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] of each prompt's first answer token."""
        return self._forward(self._ids, self._positions)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` [B]; logits [B, V] of the next."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(tokens[:, None], self._positions)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but those."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.batch_select_indices(rows)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cast(torch.Tensor, out.logits[:, -1])
