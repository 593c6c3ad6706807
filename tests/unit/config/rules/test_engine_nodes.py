"""Rules on engines that are spread over nodes."""

import pytest

from rlhf.config.commands import OnlineConfig
from rlhf.config.loading.load import load_config
from rlhf.config.loading.load_tools import load_bench
from rlhf.errors import ConfigError

RUN = ("--policy.model", "m", "--data.path", "d.jsonl", "--reward.rules", "length")


STAGES = "--rollout.pipeline-parallel-size"
STAGES_3 = (f"{STAGES}=3",)


def over_nodes(nodes: int, gpus: int, *more: str) -> list[str]:
    return [f"--rollout.num-nodes-per-engine={nodes}", f"--rollout.tensor-parallel-size={gpus}", *more]


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 3), (2, 2), (2, 3), (8, 2), (4, 12)])
def test_stages_multiply_the_gpus_of_an_engine(gpus: int, nodes: int) -> None:
    config = load_config("grpo", [*RUN, *over_nodes(nodes, gpus, f"{STAGES}={nodes}")], {})
    assert isinstance(config, OnlineConfig)
    assert config.rollout.devices_per_engine == gpus * nodes
    load_config("grpo", [*RUN, *over_nodes(nodes, 1, f"{STAGES}={nodes}", "--cluster.device=cpu")], {})


@pytest.mark.parametrize("more", [(), ("--rollout.pipeline-parallel-size=2",)])
def test_experts_are_divided_among_the_gpus_of_a_stage(more: tuple[str, ...]) -> None:
    load_config("grpo", [*RUN, "--rollout.expert-parallel", "--rollout.tensor-parallel-size=2", *more], {})


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 3), (2, 2), (2, 16), (4, 8), (3, 3)])
def test_an_engine_may_have_equally_many_gpus_on_each_node(nodes: int, gpus: int) -> None:
    load_config("grpo", [*RUN, *over_nodes(nodes, gpus)], {})
    load_config("grpo", [*RUN, *over_nodes(nodes, nodes, "--cluster.device=cpu")], {})


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (over_nodes(2, 1), "2 does not divide 1, the GPUs of .* multiple of 2, as 2"),
        (over_nodes(2, 5), "2 does not divide 5, .* multiple of 2, as 6"),
        (over_nodes(16, 8), "16 does not divide 8, .* multiple of 16, as 16"),
        (
            over_nodes(2, 4, "--rollout.engine=transformers"),
            "tensor-parallel-size: the transformers engine runs on one device",
        ),
        (
            over_nodes(2, 4, "--colocate=policy,rollout", "--policy.num-gpus-per-node=2"),
            "num-nodes-per-engine: an engine has 2 nodes, and policy, which shares its devices, has 1",
        ),
        (
            over_nodes(2, 4, "--cluster.device=cpu"),
            "num-nodes-per-engine: 2 nodes, and 4 processes: on CPUs vLLM has one of an engine on each",
        ),
        (over_nodes(0, 1), "num-nodes-per-engine: must be"),
        (over_nodes(2, 3, *STAGES_3), r"2 does not divide 9, .* \(tensor_.* \* pipeline_parallel_size\). .* as 10"),
        (over_nodes(2, 1, *STAGES_3, "--cluster.device=cpu"), "2 nodes, and 3 processes: on CPUs vLLM has one"),
        (
            [*STAGES_3, "--rollout.engine=transformers"],
            "pipeline-parallel-size: the transformers engine runs on one device .got 3.",
        ),
        (
            [*STAGES_3, "--colocate=policy,rollout", "--policy.num-gpus-per-node=2"],
            "tensor.parallel.size: an engine needs 3 GPUs on one node, and policy, which shares its devices, has 2",
        ),
        (["--rollout.pipeline-parallel-size=0"], "pipeline-parallel-size: must be"),
        (["--rollout.expert-parallel"], "expert-parallel: the experts of a layer are divided among .*got 1"),
        (
            ["--rollout.expert-parallel", "--rollout.tensor-parallel-size=2", "--cluster.device=cpu"],
            "expert-parallel: vLLM has no kernel for it on CPUs",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config("grpo", [*RUN, *flags], {})


def test_engines_on_shared_devices_may_be_spread_over_their_nodes() -> None:
    policy = ("--policy.num-nodes=2", "--policy.num-gpus-per-node=8")
    load_config("grpo", [*RUN, *over_nodes(2, 16, "--colocate=policy,rollout", *policy)], {})


def test_a_benchmark_has_the_same_rule() -> None:
    with pytest.raises(ConfigError, match="2 does not divide 1, the GPUs of an engine"):
        load_bench(["sync", *over_nodes(2, 1)], {})
