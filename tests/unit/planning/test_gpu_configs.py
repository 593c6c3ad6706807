"""The configs for GPUs: what each is for fits, by the plan that its own comment names."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.planning.advice import shortages
from rlhf.planning.hardware import GIB, parse_cluster
from rlhf.planning.plan import Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import sections
from tests.unit.planning.support import LLAMA_3_8B, shape_of

ROOT = Path(__file__).parents[3]
CLUSTERS = {"1x24gb": "1xRTX4090", "1x80gb": "1xA100", "8x80gb": "8xA100", "16x80gb": "2x8xA100"}
CONFIGS = sorted(path for folder in CLUSTERS for path in (ROOT / "configs" / folder).glob("*.yaml"))
QWEN_3: Mapping[str, object] = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
MODELS: Mapping[str, Mapping[str, object]] = {
    "qwen3_0.6b": {
        **QWEN_3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3_1.7b": {
        **QWEN_3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3_8b": {
        **QWEN_3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama3.1_8b": LLAMA_3_8B,
}
"""Sizes of the models that the configs' names contain, from their config.json."""


def loaded(path: Path) -> tuple[str, TrainConfig]:
    """The method that a config's comment trains with it, and the config."""
    name = f"configs/{path.parent.name}/{path.name}"
    command = re.search(rf"^#   rlhf train (\S+) {name}", path.read_text(), re.MULTILINE)
    assert command is not None, "the comment shows no command"
    return command[1], load_config(command[1], [str(path)], {})


def planned(path: Path) -> Plan:
    _, config = loaded(path)
    (size,) = (sizes for name, sizes in MODELS.items() if name in path.stem)
    needs = build_algorithm(config.algo).needs
    shapes = dict.fromkeys(sections(config, needs), shape_of(size))
    return plan_run(config, needs, shapes, parse_cluster(CLUSTERS[path.parent.name]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_fits_the_gpus_of_its_folder(path: Path) -> None:
    plan = planned(path)
    assert list(shortages(plan)) == []
    assert plan.placement.num_devices == plan.cluster.num_devices, "devices are left idle"
    fullest = max(group.peak for group in plan.groups) / GIB
    assert f"`rlhf plan` expects {fullest:.0f} GiB on the fullest GPU." in path.read_text()


def test_every_folder_has_its_configs() -> None:
    assert {path.parent.name for path in CONFIGS} == set(CLUSTERS)
    methods = {loaded(path)[0] for path in CONFIGS}
    assert methods == {"sft", "rm", "dpo", "kto", "ppo", "grpo", "online-dpo"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_model_of_an_earlier_run_is_made_by_the_config_that_the_comment_names(path: Path) -> None:
    _, config = loaded(path)
    for section in config.models.values():
        if section.model and section.model.startswith("runs/"):
            name = section.model.split("/")[1]
            makers = [other for other in CONFIGS if loaded(other)[1].run.name == name]
            assert len(makers) == 1
            assert f"configs/{makers[0].parent.name}/{makers[0].name}" in path.read_text()
