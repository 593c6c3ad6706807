"""What vLLM's processes read from the environment."""

import os
from dataclasses import replace

import pytest

from rlhf.config.rollout import RolloutSection
from rlhf.engines.rollout.spec import EnginePart, EngineSpec
from rlhf.engines.rollout.vllm_environment import set_environment
from rlhf.engines.weight_sync.plugin import ENDS_WITH_PARENT

ALONE = EngineSpec(section=RolloutSection(), model="m", dtype="bfloat16", device="cuda")
OVER_NODES = ("VLLM_HOST_IP", "TORCHELASTIC_USE_AGENT_STORE", ENDS_WITH_PARENT)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    return values


def test_each_part_of_an_engine_over_nodes_is_reached_at_its_own_node(environ: dict[str, str]) -> None:
    """All meet at the store that the first one serves, and their processes end with them."""
    part = EnginePart(index=1, host="10.0.0.2", address="10.0.0.1", port=5)
    section = RolloutSection(pipeline_parallel_size=2, num_nodes_per_engine=2)
    set_environment(replace(ALONE, section=section, part=part))
    assert [environ[name] for name in OVER_NODES] == ["10.0.0.2", "True", "1"]


def test_an_engine_on_one_node_is_left_as_vllm_has_it(environ: dict[str, str]) -> None:
    set_environment(replace(ALONE, section=RolloutSection(tensor_parallel_size=8)))
    assert not environ.keys() & set(OVER_NODES)


def test_the_core_runs_in_the_engines_own_process_whatever_a_user_has_set(environ: dict[str, str]) -> None:
    """Its sampler is replaced there. What only tunes is the user's."""
    environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    set_environment(ALONE)
    assert [environ[name] for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")] == ["0", "0"]
    assert environ["VLLM_LOGGING_LEVEL"] == "INFO"
