"""Models that read images, in vLLM on a CPU, whether or not torchvision is installed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from rlhf.engines.models.text_part import language_model_class
from tests.family_models import write_family
from tests.integration.rollout_support import (
    HAS_VLLM,
    IGNORE_VLLM_IMPORT_WARNINGS,
    open_engine,
    packed,
    prompt,
    reference_log_probs,
    require_same,
)

pytestmark = [
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
    *IGNORE_VLLM_IMPORT_WARNINGS,
]


def test_the_text_part_of_a_model_with_a_tower_scores_as_in_transformers(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "mistral3")
    kind = language_model_class(AutoConfig.from_pretrained(folder))
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    engine = open_engine("vllm", folder)
    try:
        require_same(engine, packed(prompt(0, 20)), reference_log_probs(model, prompt(0, 20)))
    finally:
        engine.close()
