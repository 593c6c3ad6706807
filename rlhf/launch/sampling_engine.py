"""A rollout engine for commands that sample in their own process."""

import numpy as np

from rlhf.engines.base import generate
from rlhf.engines.models.loading import unreadable
from rlhf.engines.rollout.open_engine import ServingEngine, open_engine
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.errors import ModelError
from rlhf.types import RolloutRequest, Sampling

PROMPT_TOKENS = 32
"""Attention kernels hide numbers that are not finite in prompts of a few tokens."""
NUM_TOKENS = 2
"""The second one is computed from the KV cache."""


def open_tried_engine(spec: EngineSpec, *, name: str) -> ServingEngine:
    """Load `spec.model` as `open_engine` does, and sample a few tokens: settings in config.json that fit the weights
    may still be ones that no model computes with.

    Raises:
        ConfigError: the engine cannot do what is asked of it.
        ModelError: the model does not load, or does not compute numbers.
    """
    with unreadable(f"model: {spec.model} does not load"):
        engine = open_engine(spec, name=name)
    section, wrong = spec.section, f"model: {spec.model} does not compute with its config.json"
    trial = RolloutRequest(
        id="trial/0",
        prompt_id="trial",
        prompt_token_ids=np.zeros(min(PROMPT_TOKENS, section.max_prompt_tokens), dtype=np.int64),
        seed=0,
        sampling=Sampling(max_tokens=min(NUM_TOKENS, section.max_response_tokens)),
    )
    try:
        with unreadable(wrong):
            (rollout,) = generate(engine, [trial])
        if not np.isfinite(rollout.log_probs).all():
            raise ModelError(f"{wrong}: its log-probs are not finite.")
    except BaseException:
        engine.close()
        raise
    return engine
