"""What is known of a run's GPUs before it starts."""

import json
from pathlib import Path

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.launch.gpu_budget import gpu_budget
from rlhf.orchestrator.step.metrics import GpuBudget
from rlhf.planning.model_shape import model_shape
from rlhf.planning.roles import place
from tests.tiny_models import tiny_config

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.chdir(tmp_path)
    tiny_config().save_pretrained(tmp_path / "model")
    return load_config("sft", ["--policy.model", str(tmp_path / "model"), "--data.path", "rows.jsonl"], {})


def budget(config: TrainConfig, kinds: list[list[str]], num_epochs: int = 1) -> GpuBudget | None:
    needs = build_algorithm(config.algo).needs
    return gpu_budget(config, needs, place(config, needs), kinds, num_epochs)


def test_a_known_gpu_and_a_known_model(config: TrainConfig, tmp_path: Path) -> None:
    found = budget(config, [[H100, H100], []], num_epochs=2)
    assert found is not None
    assert (found.num_gpus, found.peak_flops) == (1, 989e12)
    assert found.training_flops is not None
    shape = model_shape("model", json.loads((tmp_path / "model" / "config.json").read_text()))
    assert found.training_flops(8.0) == 2 * 3 * shape.flops_per_token(8.0)


def test_what_is_not_known_is_left_out(config: TrainConfig, tmp_path: Path) -> None:
    assert budget(config, [[]]) is None
    for kinds in ([["TPU"]], [[H100], ["NVIDIA L4"]]):
        found = budget(config, kinds)
        assert found is not None
        assert found.peak_flops is None
    (tmp_path / "model" / "config.json").unlink()
    found = budget(config, [[H100]])
    assert found is not None
    assert found.training_flops is None
