"""A rollout engine on vLLM: the CPU and the CUDA package alike.

The engine core runs in this process, and a thread of its own steps it (`StepLoop`). Token ids and log-probs are taken
from the core directly; nothing is decoded to text.
"""

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rlhf.engines.rollout.routing_record import of_tokens
from rlhf.engines.rollout.serving import ServingGate, ServingState
from rlhf.engines.rollout.spec import STAGE, EngineSpec
from rlhf.engines.rollout.step_loop import DecodedTokens, DecodeRequest, StepLoop
from rlhf.engines.rollout.vllm_environment import set_environment
from rlhf.engines.weight_sync.base import Info
from rlhf.errors import RlhfError, WeightSyncError
from rlhf.importing import importing
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest

if TYPE_CHECKING:
    from rlhf.engines.rollout.vllm_core import VllmCore

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0


class VllmRolloutEngine:
    """Samples with vLLM's continuous batching; receives weights through vLLM's own weight transfer.

    Each request has its own seed. On CPU its tokens do not depend on the rest of the batch; CUDA kernels round by the
    shape of the batch unless VLLM_BATCH_INVARIANT is set. Log-probs are those of logits /
    temperature over the full vocabulary, before top-k and top-p (greedy: temperature 1): what a trainer computes.

    Implements `RolloutEngine` and `WeightReceiver`. Responses in progress when a weight update starts are neither lost
    nor restarted: they continue with the new weights, after their KV cache is recomputed (unless `rollout.kv_cache` is
    keep), and carry the older version.
    """

    def __init__(self, spec: EngineSpec, *, name: str = "rollout-0") -> None:
        """Load `spec.model` as policy version 0. Where `spec.adapter_rank` is above 0, nothing can be generated before
        the first adapters have arrived."""
        self._section = spec.section
        self._name = name
        self._device = spec.device
        self._gate = ServingGate(name)

        def build() -> "VllmCore":
            set_environment(spec)
            logger.info("%simporting vLLM", STAGE)
            with importing():
                from rlhf.engines.rollout.vllm_core import VllmCore  # noqa: PLC0415  - after the environment is set

            logger.info("%sloading the model and compiling it", STAGE)
            return VllmCore(spec)

        self._loop = StepLoop(name, build, self._gate, spec.section.stall_timeout_s)
        self._core = self._loop.core
        self._decode_ids: dict[str, str] = {}
        """Of the requests that have no response yet: the id that the loop knows each by."""

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """See `RolloutEngine.submit`. Waits for the end of a weight update."""
        self._gate.enter(self._section.stall_timeout_s)
        decodes = self._loop.submit([DecodeRequest(r.prompt_token_ids, r.sampling, r.seed) for r in requests])
        rollouts: list[Future[Rollout]] = []
        for request, (decode_id, decoded) in zip(requests, decodes.items(), strict=True):
            rollout: Future[Rollout] = Future()
            self._decode_ids[request.id] = decode_id
            decoded.add_done_callback(partial(self._hand_over, request, decode_id, rollout))
            rollouts.append(rollout)
        return rollouts

    def abort(self, request_ids: Collection[str]) -> None:
        """See `RolloutEngine.abort`."""
        self._loop.abort([self._decode_ids[request] for request in request_ids if request in self._decode_ids])

    def _hand_over(
        self, request: RolloutRequest, decode_id: str, rollout: "Future[Rollout]", decoded: "Future[DecodedTokens]"
    ) -> None:
        """End the future of a request as that of its tokens ended."""
        if self._decode_ids.get(request.id) == decode_id:
            del self._decode_ids[request.id]
        if decoded.cancelled():
            rollout.cancel()
        if not rollout.set_running_or_notify_cancel():
            return
        if (error := decoded.exception()) is not None:
            rollout.set_exception(error)
        else:
            rollout.set_result(rollout_of(request, decoded.result()))

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `RolloutEngine.score`. A sequence may have one token less than the engine's context length."""
        self._gate.enter(self._section.stall_timeout_s)
        parts = [
            part
            for packed in sequences
            for part in np.split(packed.token_ids, np.cumsum(packed.context_lengths)[:-1])
            if len(part) > 0
        ]
        responses = self._loop.decode([DecodeRequest(part) for part in parts])
        scores = iter(np.concatenate([np.zeros(1, np.float32), response.prompt_log_probs]) for response in responses)
        empty = np.zeros(0, np.float32)
        return [
            np.concatenate([empty, *(next(scores) for length in packed.context_lengths if length > 0)])
            for packed in sequences
        ]

    def sleep(self) -> None:
        """Enter vLLM's sleep mode (level 1): weights move to host memory and the KV cache is discarded. On CPU vLLM
        keeps both, and only the state changes. Raises RlhfError while requests are running."""
        self._loop.call(self._sleep)

    def wake_weights(self) -> None:
        """See `ServingEngine.wake_weights`."""
        self._loop.call(self._wake_weights)

    def wake(self) -> None:
        """Leave sleep mode."""
        self._loop.call(self._wake)

    def reset(self) -> None:
        """See `ServingEngine.reset`."""

        def forget() -> None:
            self._gate.require_serving()
            self._loop.abort_all(RlhfError(f"engine {self._name}: the request was aborted by a reset"))

        self._loop.call(forget)

    def peak_memory(self) -> int:
        """See `ServingEngine.peak_memory`."""
        return self._loop.call(self._core.peak_memory)

    def close(self) -> None:
        """Stop the engine and release its memory."""
        self._loop.close(CLOSE_TIMEOUT_S)
        self._core.shutdown()

    def init_weight_transfer(self, init_info: Info) -> None:
        """See `WeightReceiver.init_weight_transfer`."""
        self._remote("init_weight_transfer_engine", init_info=dict(init_info))

    def start_weight_update(self) -> None:
        """See `WeightReceiver.start_weight_update`. Running requests are paused, not finished."""
        self._loop.call(self._gate.begin_update)
        self._remote("start_weight_update")

    def update_weights(self, update_info: Info) -> None:
        """See `WeightReceiver.update_weights`."""
        self._remote("update_weights", update_info=dict(update_info))

    def finish_weight_update(self, version: int, digest: str) -> str:
        """See `WeightReceiver.finish_weight_update`."""
        self._remote("finish_weight_update")
        return self._loop.call(lambda: self._finish(version, digest))

    def _finish(self, version: int, digest: str) -> str:
        digests = set(self._core.received_digests())
        self._gate.received(digests.pop() if len(digests) == 1 else f"{len(digests)} different digests")
        try:
            own = self._gate.serve(version, digest)
            self._core.install_adapters()
        except Exception as error:
            problem = self._problem("adapters", error)
            self._gate.fail(problem)
            self._loop.abort_all(problem)
            raise problem from error
        self._core.leave_kv_cache()
        return own

    def _remote(self, method: str, **kwargs: object) -> None:
        """Call a weight-transfer method of vLLM on all workers, between two steps. If it fails during an update, the
        engine serves nothing until a complete sync."""

        def call() -> None:
            try:
                self._core.transfer(method, **kwargs)
            except Exception as error:
                problem = self._problem(method, error)
                if self._gate.state is ServingState.UPDATING:
                    self._gate.fail(problem)
                    self._loop.abort_all(problem)
                raise problem from error

        self._loop.call(call)

    def _problem(self, what: str, error: Exception) -> WeightSyncError:
        return WeightSyncError(
            str(error) if isinstance(error, WeightSyncError) else f"engine {self._name}: {what}: {error!r}"
        )

    def _sleep(self) -> None:
        if self._loop.num_pending:
            raise RlhfError(f"engine {self._name}: cannot sleep while {self._loop.num_pending} requests are running")
        self._gate.sleep()
        if self._device == "cuda":
            self._core.llm.sleep(level=1)

    def _wake_weights(self) -> None:
        if not self._gate.has_weights and self._device == "cuda":
            self._core.llm.wake_up(["weights"])
        self._gate.wake_weights()

    def _wake(self) -> None:
        if self._gate.sleeps and self._device == "cuda":
            self._core.llm.wake_up()  # what is awake already stays as it is
        self._gate.wake()


def rollout_of(request: RolloutRequest, decoded: DecodedTokens) -> Rollout:
    """The rollout of what was decoded for a request."""
    experts, num_tokens = decoded.routed_experts, len(request.prompt_token_ids) + len(decoded.token_ids)
    return Rollout(
        id=request.id,
        prompt_id=request.prompt_id,
        token_ids=np.asarray(decoded.token_ids, dtype=np.int64),
        log_probs=np.asarray(decoded.log_probs, dtype=np.float32),
        finish_reason=decoded.finish_reason,
        weight_version=decoded.weight_version,
        num_older_tokens=decoded.num_older_tokens,
        newest_version=decoded.newest_version,
        routed_experts=None if experts is None else of_tokens(experts, num_tokens),
    )
