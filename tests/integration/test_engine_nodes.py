"""GRPO on real Ray, DeepSpeed and vLLM, on a cluster of three nodes of this machine: one engine is spread over two of
them, as two tensor parallel halves or as two pipeline stages, and computes what the policy computes on the third. A
part that is lost is replaced with the engine, and the run stays the same run; so it does when it goes on from a
checkpoint."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from rlhf.cli.chaos_child import WITNESSES, Fault
from rlhf.engines.weight_sync.plugin import ENDS_WITH_PARENT
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.run_directory import newest_processes
from tests.integration.command_line import CommandLine, Run, abandoned
from tests.integration.ray_head import RayHead, joined_nodes, start_ray_head

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("RLHF_TEST_ENGINE_NODES") != "all",
        reason="minutes of runs: RLHF_TEST_ENGINE_NODES=all, every night",
    ),
]

GRPO = (
    *("grpo", "--policy.model", "policy", "--policy.lr", "1e-3", "--policy.warmup-ratio", "0"),
    *("--data.path", "prompts.jsonl", "--data.template", "plain", "--reward.function", "taste:vowels"),
    *("--rollout.engine", "vllm", "--rollout.enforce-eager", "--rollout.kv-cache-gib", "0.1"),
    *("--rollout.num-nodes-per-engine", "2"),
    *("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8", "--rollout.batch-size", "4"),
    *("--rollout.group-size", "4", "--train.batch-size", "16", "--train.num-steps", "6"),
    *(
        "--checkpoint.every-steps",
        "1",
        "--checkpoint.keep",
        "10",
        "--no-log.tensorboard",
        "--log.sample-every-steps",
        "0",
    ),
)
SIZES = {
    "halves": ("--rollout.tensor-parallel-size", "2"),
    "stages": ("--rollout.pipeline-parallel-size", "2"),
}
PART = "rollout engine 0 part 1"
FAULT = Fault(number=0, kind="kill", process=PART, phase="generate")


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[RayHead]:
    head = start_ray_head(num_cpus=1)
    with joined_nodes(head, ["127.0.0.2", "127.0.0.3"], num_cpus=1):
        yield head
    head.stop()


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def straight(command: CommandLine, three_nodes: RayHead, size: str) -> Run:
    return started(command, three_nodes, [*GRPO, *SIZES[size]], size)


def started(command: CommandLine, head: RayHead, arguments: Sequence[str], name: str) -> Run:
    before = abandoned()
    run = command.run(*arguments, "--cluster.address", head.address, name=name, environment=head.environment)
    require_ended(before)
    return run


def require_ended(before: set[Path]) -> None:
    """Nothing of an engine is left, neither a process nor a name in shared memory, but for those `before` its run."""
    processes = [process for process in psutil.process_iter() if is_of_an_engine(process)]
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    assert abandoned() <= before


def is_of_an_engine(process: psutil.Process) -> bool:
    """Whether vLLM started it for an engine over nodes of these tests."""
    try:
        return ENDS_WITH_PARENT in process.environ() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def nodes_of_engine(folder: Path) -> list[str]:
    sat = {process.name: process.host for process in newest_processes(folder)}
    return [sat["rollout engine 0"], sat[PART]]


def test_an_engine_over_two_nodes_samples_what_the_policy_computes(straight: Run) -> None:
    assert len(set(nodes_of_engine(straight.folder))) == 2
    assert [row["step"] for row in straight.metrics] == list(range(1, 7))
    for row in straight.metrics:
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["updates/applied"] == 1.0


def test_a_lost_part_is_replaced_with_its_engine(
    command: CommandLine, three_nodes: RayHead, straight: Run, size: str
) -> None:
    arguments, before = (*GRPO, *SIZES[size], "--cluster.address", three_nodes.address), abandoned()
    name = f"lost-{size}"
    run = command.run_with_faults(*arguments, name=name, environment=three_nodes.environment, faults=[FAULT])
    assert run.code == 0, run.output
    require_ended(before)
    (witness,) = read_rows(command.workplace / f"{name}-faults" / WITNESSES)
    events = [row for row in read_rows(run.folder / "events.jsonl") if row["kind"] in ("replacement", "restart")]
    (event,) = events
    text = str(event["text"])
    # Found by the call that samples, or by the one that asks whether the engine is well: whichever is under way.
    lost = rf"rollout [a-z0-9 ]+: rollout engine 0 \(node .*\) died\. It cannot go on without {PART} \(node \S+, pid "
    assert re.match(lost + rf"{witness['pid']}\), which is (gone|dead)\. .* Replaced by rollout engine 0 \(", text), (
        text
    )
    assert len(set(nodes_of_engine(run.folder))) == 2
    assert run.figures == straight.figures
    assert run.weights == straight.weights


def test_a_run_with_an_engine_over_nodes_can_be_continued(
    command: CommandLine, three_nodes: RayHead, straight: Run, size: str
) -> None:
    weights, figures = straight.weights, straight.figures
    for step in (5, 6):
        shutil.rmtree(straight.folder / "checkpoints" / f"step_{step}")
    shutil.rmtree(straight.model)
    resumed = started(command, three_nodes, [*GRPO, *SIZES[size], "--resume"], size)
    assert resumed.weights == weights
    assert resumed.figures == figures
