"""What the size of a run's models asks of its start."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from rlhf.launch.large_models import collective_timeout_s, loading_timeout_s, require_meant_device

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}


def dpo(folder: Path, sizes: Mapping[str, object], *flags: str) -> TrainConfig:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **sizes}))
    return load_config("dpo", ["--policy.model", str(folder), "--data.path", "rows.jsonl", *flags], {})


def test_a_large_model_is_not_trained_on_cpus_by_default(tmp_path: Path) -> None:
    small, large = dpo(tmp_path / "small", SMALL), dpo(tmp_path / "large", LARGE)
    needs = build_algorithm(large.algo).needs
    require_meant_device(small, needs, "cpu")
    require_meant_device(large, needs, "cuda")
    require_meant_device(dpo(tmp_path / "meant", LARGE, "--cluster.device", "cpu"), needs, "cpu")
    require_meant_device(dpo(tmp_path / "unknown", {"model_type": "other"}), needs, "cpu")
    message = r"cluster\.device: auto found no GPU in the cluster, and policy\.model has 8\.0 billion parameters\."
    with pytest.raises(ConfigError, match=message):
        require_meant_device(large, needs, "cpu")


def test_the_time_to_load_grows_with_the_weights(tmp_path: Path) -> None:
    """Policy and reference share their processes, and are read one after the other."""
    config = dpo(tmp_path / "large", LARGE, "--cluster.start-timeout-s", "100")
    needs = build_algorithm(config.algo).needs
    assert loading_timeout_s(config, needs) == pytest.approx(100 + 2 * 8.03e9 * 2 / 100e6, rel=0.01)
    unknown = dpo(tmp_path / "unknown", {"model_type": "other"}, "--cluster.start-timeout-s", "100")
    assert loading_timeout_s(unknown, needs) == 100.0


def test_ranks_wait_in_a_collective_as_long_as_the_first_one_may_read(tmp_path: Path) -> None:
    """A model of 405B takes 8,100 s at the speed that a start counts on: more than a step may take."""
    huge = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    config = dpo(tmp_path / "huge", huge, "--reference.model", str(tmp_path / "huge"))
    needs = build_algorithm(config.algo).needs
    assert collective_timeout_s(config, needs) == loading_timeout_s(config, needs) > 8100
    small = dpo(tmp_path / "small", SMALL)
    assert collective_timeout_s(small, needs) == small.train.step_timeout_s
