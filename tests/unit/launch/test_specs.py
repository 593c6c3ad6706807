"""From a config to what every actor loads."""

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from rlhf.launch.specs import make_launch_spec
from rlhf.planning.roles import place
from rlhf.types import Role

GIVEN = ("--policy.model", "m", "--data.path", "x.jsonl", "--reward.function", "rewards:score")


def test_policy_and_reference_read_tokens_at_the_temperature_of_sampling() -> None:
    """Log-probs at another one would be those of another policy: of no use as a ratio, nor as a KL."""
    config = load_config("ppo", [*GIVEN, "--rollout.temperature", "0.7"], {})
    needs = build_algorithm(config.algo).needs
    spec = make_launch_spec(config, needs, place(config, needs), dict.fromkeys(needs.trains, 1), "cpu")
    assert spec.trained[Role.POLICY].temperature == 0.7
    assert spec.scorers[Role.REFERENCE].temperature == 0.7


def test_given_answers_are_read_at_1() -> None:
    config = load_config("dpo", GIVEN[:4], {})
    needs = build_algorithm(config.algo).needs
    spec = make_launch_spec(config, needs, place(config, needs), dict.fromkeys(needs.trains, 1), "cpu")
    assert spec.trained[Role.POLICY].temperature == spec.scorers[Role.REFERENCE].temperature == 1.0


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ("--rollout.num-nodes-per-engine=2", "--rollout.tensor-parallel-size=4"),
            "num_nodes_per_engine: 2 nodes, and 4 processes: on CPUs",
        ),
        (
            ("--rollout.expert-parallel", "--rollout.tensor-parallel-size=2"),
            "expert_parallel: vLLM has no kernel for it on CPUs",
        ),
    ],
)
def test_engines_that_need_gpus_are_refused_once_the_devices_are_known(flags: tuple[str, ...], problem: str) -> None:
    """Which these are is known when the cluster is: on CPUs an engine has one process on each node, and no kernel for
    whole experts."""
    config = load_config("grpo", [*GIVEN, "--rollout.engine=vllm", *flags], {})
    needs = build_algorithm(config.algo).needs
    placement, updates = place(config, needs), dict.fromkeys(needs.trains, 1)
    assert make_launch_spec(config, needs, placement, updates, "cuda").engine is not None
    with pytest.raises(ConfigError, match=problem):
        make_launch_spec(config, needs, placement, updates, "cpu")
