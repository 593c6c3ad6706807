"""What a part of an engine over nodes asks of vLLM's executor, without one."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.rollout import RolloutSection
from rlhf.engines.rollout.spec import EnginePart, EngineSpec
from rlhf.errors import ModelError
from tests.integration.rollout_support import HAS_VLLM, IGNORE_VLLM_IMPORT_WARNINGS

if HAS_VLLM:
    with warnings.catch_warnings(action="ignore"):  # importing vLLM warns
        from rlhf.engines.rollout import vllm_part
        from rlhf.engines.rollout.vllm_part import VllmPart

pytestmark = [
    *IGNORE_VLLM_IMPORT_WARNINGS,
    pytest.mark.timeout(60),
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
]

SPEC = EngineSpec(
    section=RolloutSection(pipeline_parallel_size=2, num_nodes_per_engine=2),
    model="m",
    dtype="float32",
    device="cpu",
    part=EnginePart(index=1, host="127.0.0.2", address="127.0.0.1", port=5),
)


class Executor:
    """vLLM's executor of one node, with two processes."""

    def __init__(self, config: object, *, monitor_workers: bool) -> None:
        self.config = config
        self.monitors_itself = monitor_workers
        self.events: list[object] = []
        processes = [SimpleNamespace(terminate=lambda rank=rank: self.events.append(rank)) for rank in range(2)]
        self.workers = [SimpleNamespace(proc=process) for process in processes]

    def start_worker_monitor(self, *, inline: bool) -> None:
        assert inline
        self.events.append("ended")

    def shutdown(self) -> None:
        self.events.append("shutdown")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> "VllmPart":
    def arguments(spec: EngineSpec) -> Any:
        def config(*, usage_context: object, headless: bool) -> tuple[EngineSpec, object, bool]:
            if spec.model == "bad":
                raise ValueError("no such model")
            return spec, usage_context, headless

        return SimpleNamespace(create_engine_config=config)

    monkeypatch.setattr(vllm_part, "MultiprocExecutor", Executor)
    monkeypatch.setattr(vllm_part, "engine_arguments", arguments)
    return VllmPart(SPEC)


def executor(part: "VllmPart") -> Any:
    return part._executor


def test_a_part_has_an_executor_without_a_scheduler_that_it_watches_itself(part: "VllmPart") -> None:
    spec, _, headless = executor(part).config
    assert spec is SPEC
    assert headless
    assert not executor(part).monitors_itself


def test_a_process_that_ends_by_itself_is_a_loss(part: "VllmPart") -> None:
    assert not part.wait()


def test_a_closed_part_ends_its_processes_before_it_waits_for_them(part: "VllmPart") -> None:
    """They wait for the first part, and vLLM for them, for as long as it allows."""
    part.close()
    assert executor(part).events == [0, 1, "shutdown"]
    assert part.wait()


def test_a_part_refuses_a_model_as_the_first_one_does(part: "VllmPart") -> None:
    del part
    with pytest.raises(ModelError, match="rollout: vLLM cannot serve bad: no such model"):
        VllmPart(replace(SPEC, model="bad"))
