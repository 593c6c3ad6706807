"""Second partitions of a model's parameters within a node (hpZ)."""

import pytest

from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError

RUN = ("--policy.model", "m", "--data.path", "d.jsonl")
SIZE = "--policy.zero-hpz-partition-size"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((SIZE, "8", "--policy.num-gpus-per-node", "8", "--policy.num-nodes", "2"), None),
        ((SIZE, "4", "--policy.num-gpus-per-node", "8"), None),
        ((SIZE, "3", "--policy.num-gpus-per-node", "8"), "8 processes of a node do not split into groups of 3. Use 8"),
        ((SIZE, "8", "--policy.num-nodes", "8"), "1 processes of a node do not split into groups of 8"),
        (
            (SIZE, "8", "--policy.num-gpus-per-node", "8", "--policy.zero-stage", "2"),
            r"needs ZeRO stage 3 \(got policy.zero_stage 2\)",
        ),
    ],
)
def test_they_divide_the_processes_of_a_node(flags: tuple[str, ...], problem: str | None) -> None:
    if problem is None:
        assert load_config("sft", [*RUN, *flags], {}).models["policy"].zero_hpz_partition_size == int(flags[1])
        return
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config("sft", [*RUN, *flags], {})
    assert any("policy.zero-hpz-partition-size" in line for line in caught.value.problems)


@pytest.mark.parametrize(("reference", "is_refused"), [("1", False), ("8", False), ("4", True)])
def test_models_of_one_process_have_one_size(reference: str, is_refused: bool) -> None:
    shape = [text for role in ("policy", "reference") for text in (f"--{role}.num-gpus-per-node", "8")]
    flags = [SIZE, "8", "--reference.zero-hpz-partition-size", reference, "--cluster.colocate", "policy,reference"]
    kl = ["--algo.kl.type", "fixed", "--algo.kl.coef", "0.1", "--reward.rules", "number"]
    if not is_refused:
        load_config("grpo", [*RUN, *shape, *flags, *kl], {})
        return
    with pytest.raises(ConfigError, match="4, but policy, which shares its devices, has 8"):
        load_config("grpo", [*RUN, *shape, *flags, *kl], {})
