"""Models whose layers hold a state in place of keys and values, in vLLM on a CPU."""

from pathlib import Path

import pytest

from tests.families import tiny_family
from tests.integration.rollout_support import HAS_VLLM, IGNORE_VLLM_IMPORT_WARNINGS
from tests.tiny_models import make_policy

pytestmark = [
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
    *IGNORE_VLLM_IMPORT_WARNINGS,
]


@pytest.mark.parametrize(("family", "expected"), [("jamba", True), ("llama", False)])
def test_states_of_prefixes_are_not_cached_where_prompts_are_whole(family: str, expected: bool, tmp_path: Path) -> None:
    """vLLM refuses to keep them without chunks of prompts."""
    from vllm import EngineArgs  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415

    from rlhf.engines.rollout.vllm_arguments import has_states  # noqa: PLC0415

    make_policy(tmp_path) if family == "llama" else tiny_family(family).save_pretrained(tmp_path)
    arguments = EngineArgs(
        model=str(tmp_path),
        max_model_len=64,
        enable_chunked_prefill=False,
        enforce_eager=True,
        kv_cache_memory_bytes=2**27,
        skip_tokenizer_init=True,
        language_model_only=True,
    )
    assert has_states(arguments) == expected
    if expected:
        with pytest.raises(ValueError, match="Chunked prefill is required"):
            arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        arguments.enable_prefix_caching = False
    assert arguments.create_engine_config(UsageContext.ENGINE_CONTEXT).cache_config.enable_prefix_caching != expected
