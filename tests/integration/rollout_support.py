"""Small real engines for tests, and what plain transformers says that they should compute."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import RolloutEngine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.base import WeightReceiver
from rlhf.engines.weight_sync.probe import LEAST_TOLERANCE, PolicyProbe, require_agreement
from rlhf.types import FloatArray, IntArray, PackedTokens, RolloutRequest, Sampling

HAS_VLLM = importlib.util.find_spec("vllm") is not None
WITH_ADAPTERS = ("adapters", "four-bit")
"""Policies of the tests of weight sync whose adapters are merged into what is sent."""
KINDS = ["transformers", pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"))]
# vLLM's own imports warn; nothing that we call does.
IGNORE_VLLM_IMPORT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
]


class ServingEngine(RolloutEngine, WeightReceiver):
    """Both sides of a rollout engine, for type checkers."""

    def wake_weights(self) -> None: ...


def open_engine(
    kind: str,
    model: Path,
    *,
    max_num_seqs: int = 8,
    stall_timeout_s: float = 120.0,
    reference: Path | None = None,
    adapter_rank: int = 0,
    kv_cache: str = "recompute",
    stages: int = 1,
) -> ServingEngine:
    """A float32 engine on the CPU for the models of `tests/tiny_models.py`."""
    section = RolloutSection(
        max_num_seqs=max_num_seqs,
        max_prompt_tokens=300,
        max_response_tokens=200,
        kv_cache_gib=0.1,
        enforce_eager=True,
        stall_timeout_s=stall_timeout_s,
        kv_cache=kv_cache,
        pipeline_parallel_size=stages,
    )
    spec = EngineSpec(
        section=section,
        model=str(model),
        dtype="float32",
        device="cpu",
        reference=None if reference is None else str(reference),
        adapter_rank=adapter_rank,
    )
    if kind == "vllm":
        from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415

        return VllmRolloutEngine(spec)  # type: ignore[return-value]
    from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine  # noqa: PLC0415

    return TransformersRolloutEngine(spec)  # type: ignore[return-value]


def load_model(folder: Path) -> PreTrainedModel:
    """The same weights in plain transformers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


@torch.no_grad()
def reference_logits(model: torch.nn.Module, token_ids: IntArray) -> torch.Tensor:
    """[n, V]: logits of the token after each."""
    logits: torch.Tensor = model(torch.from_numpy(token_ids)[None]).logits[0]
    return logits


def reference_log_probs(model: torch.nn.Module, token_ids: IntArray, temperature: float = 1.0) -> FloatArray:
    """[n] by definition; 0 for the first token."""
    log_probs = (reference_logits(model, token_ids) / temperature).log_softmax(-1)
    picked = log_probs[:-1].gather(-1, torch.from_numpy(token_ids)[1:, None])[:, 0]
    return np.concatenate([np.zeros(1, np.float32), picked.numpy()])


def require_same(engine: RolloutEngine, sequences: PackedTokens, expected: FloatArray) -> None:
    """The product's own probe: an engine's log-probs [T] are the trainer's. Raises NumericsError."""
    policy = PolicyProbe(log_probs=expected, alone=expected, tolerance=LEAST_TOLERANCE)
    require_agreement("engine", 0, engine.score([sequences])[0], policy)


def packed(*sequences: IntArray) -> PackedTokens:
    """Sequences laid end to end."""
    return PackedTokens(token_ids=np.concatenate(sequences), lengths=np.array([len(s) for s in sequences]))


def prompt(seed: int, length: int = 7, vocab_size: int = 128) -> IntArray:
    """Random tokens."""
    return np.random.default_rng(seed).integers(3, vocab_size, size=length)


def request(
    seed: int, *, prompt_ids: IntArray | None = None, max_tokens: int = 12, **sampling: object
) -> RolloutRequest:
    """One request, named after its seed."""
    return RolloutRequest(
        id=f"r{seed}",
        prompt_id=f"p{seed}",
        prompt_token_ids=prompt(seed, 3 + seed % 9) if prompt_ids is None else prompt_ids,
        seed=seed,
        sampling=Sampling(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
    )
