"""Which settings of a reference name other stored log-probs."""

import pytest

from rlhf.config.models import StoredReferenceSection
from rlhf.launch.stored_reference import NOT_DECIDING, store_settings
from rlhf.types import Json

OTHERS: dict[str, object] = {
    "dtype": "bfloat16",
    "quantization": "nf4",
    "attention": "eager",
    "float32_head": True,
    "float32_router": True,
    "sequence_parallel_size": 2,
    "mlp_chunk_tokens": 64,
}
"""Another value of each setting that decides how log-probs are computed."""


def settings(values: dict[str, object] | None = None, tokenizer: str = "t", device: str = "cpu") -> dict[str, Json]:
    return store_settings(StoredReferenceSection.model_validate(values or {}), tokenizer, device)


@pytest.mark.parametrize("name", OTHERS)
def test_log_probs_that_were_computed_otherwise_are_not_read(name: str) -> None:
    assert settings({name: OTHERS[name]}) != settings()


def test_every_setting_decides_or_is_known_not_to() -> None:
    assert OTHERS.keys() | NOT_DECIDING == StoredReferenceSection.model_fields.keys()


def test_the_number_format_is_the_one_that_the_device_gives() -> None:
    assert settings({"dtype": "float32"}) == settings()
    assert settings({"dtype": "float32"}, device="cuda") != settings(device="cuda")
    assert settings({"dtype": "bfloat16"}, device="cuda") == settings(device="cuda")


def test_devices_and_tokenizers_have_their_own() -> None:
    assert settings({"dtype": "float32"}, device="cuda") != settings({"dtype": "float32"})
    assert settings(tokenizer="u") != settings()


def test_where_ranks_run_does_not_matter() -> None:
    assert settings({"num_nodes": 2, "num_gpus_per_node": 4, "zero_stage": 0, "cache_dir": "elsewhere"}) == settings()
