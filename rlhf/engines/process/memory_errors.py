"""Names what was computed when memory ran out, and the settings that lower the need for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlhf.errors import MemoryExhaustedError, RlhfError
from rlhf.types import PackedTokens

ADVICE = {
    "load": "Use more devices ({role}.num_gpus_per_node) with {role}.zero_stage 3, or {role}.offload_parameters.",
    "forward": "Lower train.max_tokens_per_micro_batch.",
    "forward_backward": "Lower train.max_tokens_per_micro_batch, or set {role}.gradient_checkpointing or "
    "{role}.mlp_chunk_tokens, or lower {role}.log_probs_chunk_tokens.",
    "optim_step": "Set {role}.zero_stage 3 on more devices, {role}.swap_optimizer or {role}.offload_optimizer.",
    "send_weights": "Lower rollout.sync_bucket_mib, or rollout.gpu_memory_utilization where engines share the GPUs.",
    "save": "Set {role}.zero_stage 3 on more devices, or {role}.offload_optimizer.",
    "engine": "Lower rollout.max_num_seqs or rollout.gpu_memory_utilization (on a CPU rollout.kv_cache_gib), or give "
    "engines devices of their own.",
}
"""Phase -> the settings that help."""
TEXTS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""What messages of RuntimeErrors of torch, CUDA libraries and vLLM contain."""


@contextmanager
def naming_memory_errors(role: str, phase: str, batches: Sequence[PackedTokens] = ()) -> Iterator[None]:
    """Raise MemoryExhaustedError if memory runs out inside. `batches` are the micro-batches of `phase`, a key of
    `ADVICE`."""
    try:
        yield
    except Exception as error:
        if (named := named_memory_error(error, role, phase, batches)) is None:
            raise
        raise named from error


def named_memory_error(
    error: BaseException, role: str, phase: str, batches: Sequence[PackedTokens] = ()
) -> MemoryExhaustedError | None:
    """`error` with its role, phase and advice, if it says that memory ran out; None for other errors."""
    if not is_out_of_memory(error):
        return None
    advice = ADVICE[phase].format(role=role)
    largest = max(batches, key=lambda batch: len(batch.token_ids), default=None)
    sizes, splittable = "", 0
    if largest is not None:
        longest = max(int(batch.lengths.max()) for batch in batches)
        sizes = f" with micro-batches of up to {len(largest.token_ids)} tokens, the longest sequence {longest}"
        splittable = len(largest.token_ids) if len(largest.lengths) > 1 else 0
        if not splittable:
            advice += f" {role}.sequence_parallel_size lets several processes share a sequence."
    said = next(iter(str(error).splitlines()), "").partition(". Of the allocated memory")[0].rstrip(".")
    return MemoryExhaustedError(f"{role} {phase}: out of memory{sizes}: {said}. {advice}", splittable)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, by itself or by its cause. Errors of this package do not."""
    while error is not None and not isinstance(error, RlhfError):
        # By name: a process without torch asks too.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS):
            return True
        error = error.__cause__
    return False
