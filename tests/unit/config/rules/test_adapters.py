"""Adapters: what is given without them, and which engine can add them."""

import pytest

from rlhf.config.commands import GrpoConfig
from rlhf.config.loading.load import load_config
from tests.unit.config.conftest import Problems

RIGHT = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")
LORA = ("--policy.lora.rank", "8")
ALONE = ("--rollout.sync-adapters", "true")
PACKED = ("--policy.quantization", "nf4")
EXPERTS = (*LORA, "--policy.lora.targets", "q_proj", "--policy.lora.targets", "experts.down_proj")
RECOMPUTED = ("--policy.gradient-checkpointing",)


@pytest.mark.parametrize(
    ("argv", "starts"),
    [
        (("--policy.lora.alpha", "16"), "--policy.lora.alpha: not used: policy.lora.rank 0 trains the model"),
        (("--policy.lora.targets", "q_proj"), "--policy.lora.targets: not used: policy.lora.rank 0 trains the model"),
        (ALONE, "--rollout.sync-adapters: the policy has no adapters"),
        ((*ALONE, "--policy.lora.rank", "513"), "--rollout.sync-adapters: vllm adds adapters up to rank 512 (got 513)"),
        (
            (*ALONE, *LORA, "--rollout.engine", "transformers"),
            "--rollout.sync-adapters: the transformers engine takes merged weights only",
        ),
        (PACKED, "--policy.quantization: nf4 holds weights that do not learn. Set policy.lora.rank above 0"),
        (
            (*ALONE, *LORA, *PACKED),
            "--rollout.sync-adapters: the engines would add the adapters to weights that are not",
        ),
        (("--policy.quantization", "int3"), "--policy.quantization: "),
        (EXPERTS, "--policy.lora.targets: experts are merged with their adapters in each forward pass"),
        ((*EXPERTS, *RECOMPUTED, *ALONE), "--rollout.sync-adapters: the engines add adapters to linear layers"),
    ],
)
def test_refused(argv: tuple[str, ...], starts: str, problems: Problems) -> None:
    (problem,) = problems(*RIGHT, *argv, command="grpo")
    assert problem.startswith(starts)


def test_engines_mix_in_no_quantized_reference(problems: Problems) -> None:
    mixture = ("--algo.mixture", "0.5", "--rollout.engine", "transformers")
    (problem,) = problems(*RIGHT, *LORA, *PACKED, *mixture, command="online-dpo")
    assert problem.startswith("reference.quantization: the engines load the reference that they mix in")
    assert problems(*RIGHT, *LORA, *PACKED, *mixture, "--reference.quantization", "none", command="online-dpo") == []


@pytest.mark.parametrize("given", [(), ("--reference.quantization", "none")])
def test_a_reference_that_is_the_policy_is_held_as_that(given: tuple[str, ...]) -> None:
    config = load_config("grpo", [*RIGHT, *LORA, *PACKED, *given], {})
    assert isinstance(config, GrpoConfig)
    assert config.reference.quantization == ("none" if given else "nf4")
    other = load_config("grpo", [*RIGHT, *LORA, *PACKED, "--reference.model", "other"], {})
    assert isinstance(other, GrpoConfig)
    assert other.reference.quantization == "none"


@pytest.mark.parametrize(
    "argv",
    [
        LORA,
        (*LORA, *ALONE),
        (*LORA, "--policy.lora.targets", "q_proj,v_proj"),
        (*LORA, *PACKED),
        (*EXPERTS, *RECOMPUTED),
    ],
)
def test_allowed(argv: tuple[str, ...], problems: Problems) -> None:
    assert problems(*RIGHT, *argv, command="grpo") == []
