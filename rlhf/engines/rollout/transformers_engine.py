"""A rollout engine on plain transformers: the default where vLLM is not installed.

It has the same protocol and the same tests as the vLLM engine, and is simpler: each call of `submit` forms its own
batches, so that requests of other calls cannot change its responses.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import numpy as np
import torch
from transformers import AutoConfig

from rlhf.config.model_files import caps_scores
from rlhf.engines.models.context import context_of
from rlhf.engines.models.text_part import language_model_class
from rlhf.engines.process.library_output import silence_libraries
from rlhf.engines.process.process_memory import peak_memory
from rlhf.engines.rollout.decoders import Decoder, MixedDecoder, ModelDecoder
from rlhf.engines.rollout.sampling import SamplingRows
from rlhf.engines.rollout.serving import ServingGate, ServingState
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.base import Info
from rlhf.engines.weight_sync.buckets import dtype_of
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.errors import ModelError, WeightSyncError
from rlhf.types import FinishReason, FloatArray, PackedTokens, Rollout, RolloutRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class TransformersRolloutEngine:
    """Samples with `forward` and a KV cache, `max_num_seqs` responses at a time; receives weights through gloo.

    A request's seed decides its tokens. One exception: in a batch of another shape, matrix products round the last bits
    of the logits differently (about 1e-6 in float32), which can change a draw that falls exactly between two tokens.
    The same call always gives the same bits.

    Implements `RolloutEngine` and `WeightReceiver`. A thread runs batch after batch. Consumes: requests, from any
    thread. Produces: rollouts. Waits for: the lock that one batch holds at a time, and the end of a weight update; an
    update waits for the running batch. Unblocked by: the end of the batch, `finish_weight_update`, or an update that
    fails.

    One thread does all computation, whichever thread calls: every thread that computes starts its own OpenMP threads,
    and with more of them than cores a token takes about 50% longer.
    """

    def __init__(self, spec: EngineSpec, *, name: str = "rollout-0") -> None:
        """Load `spec.model` as policy version 0. Raises ModelError where the vocabulary of `spec.reference` is not the
        policy's."""
        silence_libraries()
        self._section = spec.section
        self._name = name
        self._device = torch.device(spec.device)
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._batching = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._unbegun: dict[str, Future[Rollout]] = {}
        """The futures of requests whose batch has not begun."""
        self._model = self._compute(_load, spec.model, spec.dtype)
        self._reference = None if spec.reference is None else self._compute(_load, spec.reference, spec.dtype)
        if self._reference is not None and self._reference.config.vocab_size != self._model.config.vocab_size:
            raise ModelError(
                f"reference.model: {self._reference.config.vocab_size} logits a token, the policy has "
                f"{self._model.config.vocab_size}: they cannot be mixed."
            )
        self._compute(self._move, self._device)
        self._parameters = dict(self._model.named_parameters())
        self._context = context_of(self._model.config)
        self._gate = ServingGate(name)
        self._busy = threading.Lock()
        self._receiver: GlooReceiver | None = None
        self._expected: set[str] = set()

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """See `RolloutEngine.submit`. The requests of one call form batches among themselves, which run one after the
        other, behind those of earlier calls."""
        futures: list[Future[Rollout]] = [Future() for _ in requests]
        for batch in self._batches(requests):
            asked = [(requests[index], futures[index]) for index in batch]
            self._unbegun.update((request.id, future) for request, future in asked)
            self._batching.submit(self._run_batch, asked)
        return futures

    def abort(self, request_ids: Collection[str]) -> None:
        """See `RolloutEngine.abort`. Responses of the running batch come nevertheless."""
        for request_id in request_ids:
            if (future := self._unbegun.pop(request_id, None)) is not None:
                future.cancel()

    def _run_batch(self, asked: Sequence[tuple[RolloutRequest, "Future[Rollout]"]]) -> None:
        """Sample the responses of one batch, and end their futures. On the batching thread."""
        wanted = [(request, future) for request, future in asked if future.set_running_or_notify_cancel()]
        for request, _ in wanted:
            self._unbegun.pop(request.id, None)
        if not wanted:
            return
        try:
            with self._turn() as version:
                rollouts = self._compute(self._generate_batch, [request for request, _ in wanted], version)
        except Exception as error:  # the boundary of the thread: those who wait for the futures raise it
            for _, future in wanted:
                future.set_exception(error)
            return
        for (_, future), rollout in zip(wanted, rollouts, strict=True):
            future.set_result(rollout)

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `RolloutEngine.score`."""
        with self._turn():
            return [self._compute(self._score, packed) for packed in sequences]

    def sleep(self) -> None:
        """Enter sleep mode: on a GPU the weights move to host memory; on CPU only the state changes."""
        with self._busy:
            self._gate.sleep()
            if self._device.type == "cuda":
                self._compute(self._move, torch.device("cpu"))
                torch.cuda.empty_cache()

    def wake_weights(self) -> None:
        """See `ServingEngine.wake_weights`. There is no KV cache outside a batch."""
        with self._busy:
            self._compute(self._move, self._device)
            self._gate.wake_weights()

    def wake(self) -> None:
        """Leave sleep mode."""
        with self._busy:
            self._compute(self._move, self._device)
            self._gate.wake()

    def reset(self) -> None:
        """See `ServingEngine.reset`. Waits for the running batch."""
        self.abort(list(self._unbegun))
        with self._busy:
            self._gate.require_serving()

    def peak_memory(self) -> int:
        """See `ServingEngine.peak_memory`."""
        return peak_memory()

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
            digest = self._compute(self._receiver.receive, info, self._load)
            if self._expected:
                missing = ", ".join(sorted(self._expected))
                raise WeightSyncError(f"engine {self._name}: version {info.version}: never sent: {missing}")
        except WeightSyncError as error:
            self._gate.fail(error)
            raise
        self._gate.received(digest)

    def finish_weight_update(self, version: int, digest: str) -> str:
        """See `WeightReceiver.finish_weight_update`. There is no prefix cache: each batch has its own KV cache."""
        return self._gate.serve(version, digest)

    def _compute(self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Run `work` on the computing thread; returns its result."""
        return self._computing.submit(work, *args, **kwargs).result()

    @contextmanager
    def _turn(self) -> Iterator[int]:
        """Hold the model while it is serving; gives the version. Never waits for an update while holding the lock."""
        while True:
            self._gate.enter(self._section.stall_timeout_s)
            with self._busy:
                if self._gate.state is ServingState.SERVING:
                    yield self._gate.version
                    return

    def _batches(self, requests: Sequence[RolloutRequest]) -> Iterator[list[int]]:
        """Indices of the requests of each batch. Prompts of similar length share a batch, to need less padding.
        Requests that mix in a reference have their own batches, because they run two models. Depends on the requests
        only."""
        size = self._section.max_num_seqs_on(self._device.type)
        for mixes in (False, True):
            chosen = [i for i, request in enumerate(requests) if (request.sampling.mixture > 0.0) == mixes]
            chosen.sort(key=lambda i: (len(requests[i].prompt_token_ids), requests[i].id, i))
            yield from (chosen[start : start + size] for start in range(0, len(chosen), size))

    def _move(self, device: torch.device) -> None:
        for model in (self._model, self._reference):
            if model is not None:
                torch.nn.Module.to(model, device)

    @torch.no_grad()
    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self._parameters[name].copy_(tensor)
            self._expected.discard(name)

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[RolloutRequest], version: int) -> list[Rollout]:
        self._check(requests)
        limits = np.array([min(r.sampling.max_tokens, self._context - len(r.prompt_token_ids)) for r in requests])
        longest = int(limits.max())
        tokens = np.zeros((len(requests), longest), dtype=np.int64)
        log_probs = np.zeros((len(requests), longest), dtype=np.float32)
        lengths = limits.copy()
        stopped = np.zeros(len(requests), dtype=bool)

        rows = np.arange(len(requests))  # row of the batch -> request; ended rows leave once they are half of the batch
        sampling = SamplingRows.of(requests, self._device)
        decoder = self._decoder(requests)
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

    def _decoder(self, requests: Sequence[RolloutRequest]) -> Decoder:
        prompts = [request.prompt_token_ids for request in requests]
        policy = ModelDecoder(self._model, prompts, self._device)
        if not any(request.sampling.mixture > 0.0 for request in requests):
            return policy
        if self._reference is None:
            raise ModelError(f"request {requests[0].id}: asks for a mixture, but this engine has no reference model")
        shares = torch.tensor([[request.sampling.mixture] for request in requests], device=self._device)
        return MixedDecoder(policy, ModelDecoder(self._reference, prompts, self._device), shares)

    def _check(self, requests: Sequence[RolloutRequest]) -> None:
        problems = [
            f"request {r.id}: prompt of {len(r.prompt_token_ids)} tokens, need 1 to {self._context - 1}"
            for r in requests
            if not 0 < len(r.prompt_token_ids) < self._context
        ]
        if problems:
            raise ModelError(problems)

    @torch.inference_mode()
    def _score(self, packed: PackedTokens) -> FloatArray:
        scores = np.zeros(len(packed.token_ids), dtype=np.float32)
        start = 0
        for length in packed.context_lengths.tolist():
            ids = torch.from_numpy(packed.token_ids[start : start + length]).to(self._device)
            if length > 1:
                logits = self._model(ids[None, :-1], use_cache=False).logits[0].float()
                log_probs = torch.log_softmax(logits, dim=-1).gather(-1, ids[1:, None])[:, 0]
                scores[start + 1 : start + length] = log_probs.cpu().numpy()
            start += length
        return scores


def _load(model: str, dtype: str) -> "PreTrainedModel":
    kind = language_model_class(AutoConfig.from_pretrained(model))
    loaded: PreTrainedModel = kind.from_pretrained(model, dtype=dtype_of(dtype), use_safetensors=True)
    if caps_scores(loaded.config.to_dict()):
        loaded.set_attn_implementation("eager")  # sdpa knows no caps
    torch.nn.Module.eval(loaded).requires_grad_(False)
    return loaded
