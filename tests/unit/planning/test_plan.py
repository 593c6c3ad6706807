"""Whole plans: the familiar launches, by hand."""

import shlex
from dataclasses import replace
from math import ceil, inf

import pytest

from rlhf.errors import ConfigError
from rlhf.planning.advice import shortages
from rlhf.planning.hardware import GIB, parse_cluster
from rlhf.planning.memory import ModelLoad
from rlhf.planning.timing import USUAL, Engines, Machine, learning
from rlhf.planning.workload import Lengths
from rlhf.types import Role
from tests.unit.planning.support import LLAMA_3_8B, LLAMA_3_70B, QWEN_3_30B, plan_for, shape_of

PPO = shlex.split(
    "--policy.num-gpus-per-node 4 --reference.num-gpus-per-node 4 --critic.num-gpus-per-node 4 "
    "--reward.num-gpus-per-node 4 --rollout.num-engines 4 --rollout.tensor-parallel-size 2 --reward.model "
    "org/reward --policy.gradient-checkpointing --critic.gradient-checkpointing --rollout.batch-size 512 "
    "--rollout.max-prompt-tokens 1024 --rollout.max-response-tokens 1024 --train.batch-size 128 "
    "--train.max-tokens-per-micro-batch 16384"
)
MERGED = ["--colocate", "policy,reference", "--colocate", "critic,reward"]


def test_a_familiar_launch_takes_16_devices_and_24_without_merges() -> None:
    merged, separate = plan_for("ppo", [*PPO, *MERGED], "2x8xH100"), plan_for("ppo", PPO, "3x8xH100")
    assert (merged.placement.num_devices, separate.placement.num_devices) == (16, 24)
    assert (len(merged.groups), len(separate.groups)) == (3, 5)
    assert merged.fits
    assert separate.fits


def test_one_node_is_too_few_for_it() -> None:
    with pytest.raises(ConfigError, match=r"rollout: bundle 1 of 4 needs 2 devices; free are 0 on node 0"):
        plan_for("ppo", [*PPO, *MERGED], "8xH100")


def test_ppo_of_8b_by_hand() -> None:
    """The calculation that docs/planning.md shows."""
    plan = plan_for("ppo", [*PPO, *MERGED], "2x8xH100")
    policy = plan.groups[0].memory["learn"][Role.POLICY]
    numbers = 8_030_261_248
    assert policy.parameters == numbers * 2 / 4
    assert policy.gradients == numbers * 4 / 4
    assert policy.optimizer == numbers * 12 / 4
    # A layer keeps 4 hidden states, queries twice, keys and values twice and 4 widths in bfloat16, 2 hidden states and
    # 34 numbers in float32; two layers whole, and one hidden state of each of 32.
    layer = (4 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336) * 2 + 2 * 4096 * 4 + 34 * 4
    assert policy.activations == 16384 * (32 * 4096 * 2 + 2 * layer)
    assert policy.logits == 3 * 1024 * 128256 * 4 + 128256 * 4096 * 4
    assert policy.gathered == 2 * 10**9 + 2 * 5 * 10**8
    assert plan.groups[0].memory["learn"][Role.REFERENCE].total == numbers * 2 / 4
    assert plan.groups[0].peak_phase == "learn"
    assert plan.groups[0].peak / GIB == pytest.approx(55.0, abs=0.1)


def test_seconds_of_ppo_of_8b_by_hand() -> None:
    plan = plan_for("ppo", [*PPO, *MERGED], "2x8xH100")
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 128256 * 4096
    per_token = 2 * weights + 4 * 32 * 4096 * 1024
    compute = 512 * 2048 / 4 * per_token * 4 / (989e12 * 0.4)
    passes = 16  # 4 optimizer steps, in each of which a rank sees 4 micro-batches of 16384 tokens
    assert plan.seconds["learn"] == pytest.approx(compute + 2 * passes * 0.02, rel=0.01)
    assert plan.seconds["sync"] == pytest.approx(8_030_261_248 * 2 / (50e9 * 0.7))


def test_grpo_of_70b_on_64_devices() -> None:
    flags = shlex.split(
        "--policy.num-nodes 4 --policy.num-gpus-per-node 8 --reference.num-nodes 4 "
        "--reference.num-gpus-per-node 8 --colocate policy,reference --rollout.num-engines 8 "
        "--rollout.tensor-parallel-size 4 --reward.rules math --policy.gradient-checkpointing "
        "--rollout.max-response-tokens 1024 --algo.kl.coef 0.001"
    )
    plan = plan_for("grpo", flags, "8x8xH100", LLAMA_3_70B)
    numbers = 70_553_706_496
    assert plan.placement.num_devices == 64
    policy = plan.groups[0].memory["learn"][Role.POLICY]
    assert policy.parameters + policy.gradients + policy.optimizer == numbers * 18 / 32
    assert plan.groups[0].memory["learn"][Role.REFERENCE].parameters == numbers * 2 / 32
    assert plan.groups[1].memory["generate"][Role.ROLLOUT].parameters == numbers * 2 / 4
    assert plan.cache_tokens == pytest.approx(
        (0.85 * 79.6 * GIB - numbers * 2 / 4 - 2.3 * GIB) / (2 * 80 * 8 * 128 * 2 / 4), rel=1e-6
    )
    assert plan.fits
    # One process reads policy and reference one after the other, for all ranks.
    assert plan.groups[0].reading_bytes == numbers * 2
    assert [group.exporting_bytes for group in plan.groups] == [2 * 5e9, 0]
    # A node's eight of 32 ranks read their part of weights, master copies and moments.
    assert plan.peak_host_bytes == numbers * 14 / 4
    assert [plan.storing_bytes(node) for node in range(8)] == [*[numbers * 14 / 4] * 4, *[0] * 4]
    narrow = replace(plan.cluster, device=replace(plan.cluster.device, host_gib=16.0))
    (shortage,) = shortages(replace(plan, cluster=narrow))
    assert shortage.endswith("need 230 GiB on a node, it has 128.")


def test_ppo_of_8b_with_everything_on_8_devices() -> None:
    """The table in docs/planning.md."""
    flags = (
        "--policy.num-gpus-per-node 8 --reference.num-gpus-per-node 8 --critic.num-gpus-per-node 8 --colocate all "
        "--reward.model rm --reward.num-gpus-per-node 8 --rollout.num-engines 8 --policy.gradient-checkpointing "
        "--rollout.gpu-memory-utilization 0.4 --critic.gradient-checkpointing --train.max-tokens-per-micro-batch 8192 "
        "--policy.swap-optimizer --critic.swap-optimizer"
    )
    (group,) = (plan := plan_for("ppo", shlex.split(flags), "8xH100")).groups
    policy, scalar, table = 8_030_261_248, 8_030_261_248 - 128_256 * 4096 + 4096, 128_256 * 4096 * 2
    checksum = 2 * 8 * 2**24
    sending, receiving = (group.memory["sync"][role] for role in (Role.POLICY, Role.ROLLOUT))
    assert sending.gathered + sending.sync == table + 2 * table + checksum
    assert receiving.sync == table + table + checksum
    # The KV cache sleeps while weights are sent.
    assert group.memory["generate"][Role.ROLLOUT].kv_cache > 14 * GIB
    assert group.memory["sync"][Role.ROLLOUT].kv_cache == 0
    # An engine sleeps while models compute: its weights are in host memory, and its graphs stay.
    assert group.memory["learn"][Role.ROLLOUT].total == 2.3 * GIB
    asleep, moments = policy * 2, 12 * (policy + scalar)
    assert group.host_bytes == pytest.approx(8 * asleep + moments)
    # While the policy resumes: the weights, their master copies and two moments of its eight ranks.
    assert plan.peak_host_bytes == group.host_bytes + 14 * policy
    assert group.exporting_bytes == 2 * 5e9
    assert plan.fits
    alone = plan_for("ppo", [*shlex.split(flags), "--rollout.enforce-eager"], "8xH100")
    assert alone.groups[0].memory["learn"][Role.ROLLOUT].total == 1.3 * GIB


def test_phases_follow_one_another_and_groups_work_side_by_side() -> None:
    plan = plan_for("ppo", [*PPO, *MERGED], "2x8xH100")
    assert plan.step_s == pytest.approx(sum(plan.seconds.values()))
    assert plan.seconds["learn"] == max(group.seconds["learn"] for group in plan.groups)
    ahead = plan_for("ppo", [*PPO, *MERGED, "--rollout.max-lag", "1"], "2x8xH100")
    assert ahead.step_s == pytest.approx(
        max(
            plan.seconds["generate"] + plan.seconds["score"],
            sum(plan.seconds[p] for p in ("log_probs", "learn", "sync")),
        )
    )
    assert 0 < ahead.idle_share < plan.idle_share < 1


def test_shorter_answers_take_less_time_and_the_same_memory() -> None:
    plan, short = (
        plan_for("ppo", [*PPO, *MERGED], "2x8xH100", lengths=lengths) for lengths in (Lengths(), Lengths(response=256))
    )
    assert short.step_s < plan.step_s
    assert [group.peak for group in short.groups] == [group.peak for group in plan.groups]


def test_engines_on_shared_devices_sleep_while_models_learn() -> None:
    flags = ["--colocate", "all", "--rollout.num-engines", "1", "--rollout.gpu-memory-utilization", "0.5"]
    plan = plan_for("grpo", [*flags, "--reward.rules", "math"], "1xH100", {**LLAMA_3_8B, "num_hidden_layers": 1})
    held = plan.groups[0].memory
    assert held["generate"][Role.ROLLOUT].kv_cache > 0
    assert held["learn"][Role.ROLLOUT].total == held["learn"][Role.ROLLOUT].process


def test_thousands_of_devices_are_planned() -> None:
    flags = [*PPO, "--policy.num-nodes", "128", "--policy.num-gpus-per-node", "8", "--rollout.num-engines", "512"]
    plan = plan_for("ppo", flags, "512x8xH100")
    assert plan.placement.num_devices == 1024 + 12 + 1024
    assert len(plan.groups[-1].bundles) == 512


@pytest.mark.parametrize(
    ("text", "shown"), [("16x8xH100", "16x8xH100"), ("8xa100", "1x8xA100"), ("1xA100-40", "1x1xA100-40")]
)
def test_a_cluster_in_a_word(text: str, shown: str) -> None:
    assert str(parse_cluster(text)) == shown


@pytest.mark.parametrize(
    ("text", "problem"),
    [("H100", "need NODESxDEVICESxKIND"), ("2x8xV900", 'no data sheet of "V900"'), ("0x8xH100", "at least one node")],
)
def test_a_cluster_that_cannot_be(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_cluster(text)


def test_without_devices_all_processes_share_the_node_s_memory() -> None:
    flags = ["--reward.rules", "math", "--rollout.kv-cache-gib", "1"]
    tiny = {**LLAMA_3_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    plan = plan_for("grpo", flags, "2xCPU", tiny)
    assert all(group.capacity == 16 * GIB for group in plan.groups)
    assert plan.peak == sum(group.peak for group in plan.groups)
    assert plan.fits
    wider = {**tiny, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    large = plan_for("grpo", [*flags, "--rollout.kv-cache-gib", "9"], "2xCPU", wider)
    assert all(group.fits for group in large.groups)
    assert large.short_of_memory
    assert not large.fits
    assert any("all processes together need" in line for line in shortages(large))


LONG = ("--policy.num-gpus-per-node", "8", "--policy.gradient-checkpointing", "--data.max-tokens", "65536")


def test_processes_that_share_sequences_each_hold_their_share_of_the_activations() -> None:
    alone, shared = (plan_for("sft", [*LONG, "--policy.sequence-parallel-size", size], "8xH100") for size in "14")
    held = [plan.groups[0].memory["learn"][Role.POLICY] for plan in (alone, shared)]
    assert held[1].activations == held[0].activations / 4
    assert held[1].parameters == held[0].parameters
    assert shared.fitting_tokens == pytest.approx(4 * alone.fitting_tokens, rel=0.02)
    assert alone.fitting_tokens > 65536


def test_a_sequence_that_fits_is_planned_to_fit_and_a_longer_one_is_not() -> None:
    most = plan_for("sft", LONG, "8xH100").fitting_tokens
    assert plan_for("sft", [*LONG[:-1], str(most)], "8xH100").fits
    assert not plan_for("sft", [*LONG[:-1], str(most + 256)], "8xH100").fits


def test_longer_sequences_fit_with_chunks_and_activations_in_host_memory() -> None:
    chunks, away = ("--policy.mlp-chunk-tokens", "4096"), ("--policy.gradient-checkpointing", "offload")
    flags = [*LONG, "--policy.swap-optimizer"]
    plain, chunked, both = (plan_for("sft", [*flags, *more], "8xH100") for more in ((), chunks, (*chunks, *away)))
    assert plain.fitting_tokens < chunked.fitting_tokens < both.fitting_tokens
    each = 65536 * 4096 * 2
    assert both.groups[0].host_bytes - chunked.groups[0].host_bytes == 8 * 32 * each
    assert both.seconds["learn"] - chunked.seconds["learn"] == pytest.approx(
        both.work.learned_tokens / 8 * 2 * 32 * 4096 * 2 / 25e9
    )
    mlp = 2 * 32 * 3 * 4096 * 14336 / plain.shapes[Role.POLICY].flops_per_token(plain.work.sequence_tokens / 2)
    fixed = plain.fixed_seconds["learn"]
    assert (chunked.seconds["learn"] - fixed) / (plain.seconds["learn"] - fixed) == pytest.approx(
        (4 + mlp) / 4, rel=1e-3
    )


def test_heads_that_do_not_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy.sequence_parallel_size: 32 attention heads do not split over 3"):
        plan_for("sft", ["--policy.num-gpus-per-node", "3", "--policy.sequence-parallel-size", "3"], "8xH100")


def test_experts_that_do_not_split_are_refused() -> None:
    flags = ["--policy.num-gpus-per-node", "3", "--policy.expert-parallel-size", "3"]
    with pytest.raises(ConfigError, match=r"policy.expert_parallel_size: 128 experts do not split over 3 processes"):
        plan_for("sft", flags, "8xH100", QWEN_3_30B)


def test_tokens_travel_to_experts_instead_of_experts_to_tokens() -> None:
    """Eight ranks in two groups of four: a rank gathers a quarter of the experts, half of which it has, and sends each
    token to 8 experts, three quarters of which are elsewhere."""
    flags = ["--policy.num-gpus-per-node", "8", "--train.max-tokens-per-micro-batch", "16384"]
    load = ModelLoad(shape=shape_of(QWEN_3_30B), num_ranks=8, dtype_bytes=2, learns=True, zero_stage=3)
    split, machine = replace(load, expert_parallel=4), Machine(sheet=parse_cluster("8xH100").device, num_nodes=1)
    work = plan_for("sft", flags, "8xH100", QWEN_3_30B).work
    slow = replace(USUAL, learning=inf, exchange=1e-6, micro_batch_s=0.0)
    experts, all_parameters = 48 * 128 * 3 * 2048 * 768, load.shape.num_parameters
    updates = work.num_updates // work.num_passes
    batches = updates * ceil(work.learned_tokens / 8 / updates / work.micro_batch_tokens)
    gathered = {load: all_parameters * 7 / 8, split: (all_parameters - experts) * 7 / 8 + experts / 4 * 1 / 2}
    sent = {load: 0.0, split: work.learned_tokens / 8 * 2 * 48 * 2 * 8 * 2048 * 3 / 4}
    for one in (load, split):
        num_bytes = 2 * (batches * 3 * gathered[one] + sent[one])
        speed = machine.exchange_gb_s * 1e9 * 1e-6
        assert learning(one, work, machine, slow) == pytest.approx(work.num_passes * num_bytes / speed, rel=1e-5)


def test_a_step_lasts_as_long_as_its_longest_response_unless_it_takes_what_is_ready() -> None:
    """16 groups of 8 responses of 100 tokens on average: the longest of 128 has 100 * 5.43 tokens, the 128th of 160 has
    100 * (5.66 - 4.06)."""
    flags = shlex.split(
        "--rollout.batch-size 16 --rollout.group-size 8 --rollout.num-engines 1 --rollout.max-num-seqs 256 "
        "--rollout.max-response-tokens 4096 --reward.rules math"
    )

    def decoded(*more: str) -> float:
        return plan_for("grpo", [*flags, *more], "8xH100", lengths=Lengths(prompt=64, response=100)).work.least_decoded

    lag = ("--rollout.max-lag", "1")
    assert decoded() == pytest.approx(543.3, abs=0.1)
    assert decoded("--rollout.max-response-tokens", "400") == 400.0
    assert decoded("--rollout.oversample", "1.25", "--rollout.order", "ready") == pytest.approx(159.3, abs=1.0)
    assert decoded(*lag) == pytest.approx(543.3 / 2, abs=0.1)
    assert decoded(*lag, "--rollout.order", "ready") == 0.0


def test_seconds_of_a_tail_by_hand() -> None:
    """8 responses side by side: 100 tokens each with all caches read, and the rest of the longest one by itself."""
    flags = shlex.split(
        "--rollout.batch-size 1 --rollout.group-size 8 --rollout.num-engines 1 --rollout.max-response-tokens 4096 "
        "--reward.rules math --train.batch-size 8"
    )
    with_tail = plan_for("grpo", flags, "8xH100", lengths=Lengths(prompt=64, response=100))
    without = plan_for(
        "grpo", [*flags, "--rollout.max-lag", "1", "--rollout.order", "ready"], "8xH100",
        lengths=Lengths(prompt=64, response=100),
    )  # fmt: skip
    tail = 100 * sum(1 / k for k in range(2, 9))
    weights_s = 8_030_261_248 * 2 / (3350e9 * 0.6)
    expected = tail * (weights_s + 0.004)
    assert with_tail.seconds["generate"] - without.seconds["generate"] == pytest.approx(expected, rel=0.01)
    assert with_tail.step_s > without.step_s


def test_with_a_second_copy_in_each_node_only_the_first_gather_is_over_the_network() -> None:
    flags = shlex.split(
        "--policy.num-nodes 2 --policy.num-gpus-per-node 8 --policy.gradient-checkpointing "
        "--train.max-tokens-per-micro-batch 1024 --train.batch-size 128"
    )
    lengths = Lengths(prompt=256.0, response=256.0)
    without = plan_for("sft", flags, "2x8xH100", lengths=lengths)
    second = plan_for("sft", [*flags, "--policy.zero-hpz-partition-size", "8"], "2x8xH100", lengths=lengths)
    sheet = second.cluster.device
    gathered, rate = 8_030_261_248 * 2, 10**9 * 0.7
    across, within = gathered * 15 / 16 / (sheet.network_gb_s * rate), gathered * 7 / 8 / (sheet.link_gb_s * rate)
    faster = without.groups[0].seconds["learn"] - second.groups[0].seconds["learn"]
    batches = 128 * 512 / 16 / 1024  # of each rank; forward and backward gather in each
    assert faster == pytest.approx((2 * batches - 1) * (across - within))
    assert second.groups[0].peak - without.groups[0].peak == gathered / 8


def sampled_by(tensor_parallel: int, group_size: int) -> list[str]:
    """Flags of a run with one group of responses a step."""
    return shlex.split(
        "--reward.rules length --policy.num-gpus-per-node 8 --policy.zero-stage 3 --policy.gradient-checkpointing "
        "--rollout.max-prompt-tokens 100 --rollout.max-response-tokens 300 --rollout.batch-size 1 "
        f"--rollout.tensor-parallel-size {tensor_parallel} --rollout.group-size {group_size} "
        f"--train.batch-size {group_size}"
    )


def test_an_engine_over_two_nodes_by_hand() -> None:
    """As many GPUs on one node would compute the same, without the network: two all-reduces of a token in each layer,
    of which a node sends what it has and gets as much, through eight ports."""
    flags = sampled_by(tensor_parallel=16, group_size=2)
    one = plan_for("grpo", flags, "2x16xH100")
    two = plan_for("grpo", [*flags, "--rollout.num-nodes-per-engine", "2"], "3x8xH100")
    (engines,) = (group for group in two.groups if Role.ROLLOUT in group.group.roles)
    assert engines.group.shape.num_devices == 16
    assert len({bundle.node for bundle in engines.bundles}) == 2
    assert engines.memory["generate"][Role.ROLLOUT].parameters == 8_030_261_248 * 2 / 16
    assert two.cache_tokens == one.cache_tokens
    sent = 2 * 32 * 4096 * 2 / (50e9 * 8 * 0.7)
    network_s = 300 * (2 * sent + 2 * 32 * 30e-6) + 2 * 100 * sent
    assert two.seconds["generate"] - one.seconds["generate"] == pytest.approx(network_s)


def test_an_engine_of_two_stages_by_hand() -> None:
    """Two responses are in different stages at any time. Beside one stage alone each reads half of the KV cache and
    computes half of the layers in the same time, and hands on one message."""
    flags = sampled_by(tensor_parallel=8, group_size=2)
    one = plan_for("grpo", flags, "2x8xH100")
    spread = ("--rollout.pipeline-parallel-size", "2", "--rollout.num-nodes-per-engine", "2")
    two = plan_for("grpo", [*flags, *spread], "3x8xH100")
    (engines,) = (group for group in two.groups if Role.ROLLOUT in group.group.roles)
    assert engines.group.shape.num_devices == 16
    assert len({bundle.node for bundle in engines.bundles}) == 2
    held = engines.memory["generate"][Role.ROLLOUT]
    assert held.parameters == (16 * 218_112_000 + 525_336_576 + 4096) * 2 / 8  # the last stage, with the output layer
    assert two.cache_tokens == pytest.approx(held.kv_cache / (2 * 16 * 8 * 128 * 2 / 8))
    sheet = two.cluster.device
    cache_s = 2 * 250 * 2 * 32 * 8 * 128 * 2 / (sheet.memory_gb_s * 1e9 * 8 * 0.6)
    prompt_s = 2 * 100 * shape_of(LLAMA_3_8B).flops_per_token(50) / (sheet.tflops * 1e12 * 8 * 0.5)
    faster = 300 * (cache_s / 2 - 30e-6) + prompt_s / 2
    assert one.seconds["generate"] - two.seconds["generate"] == pytest.approx(faster)


def test_a_response_alone_is_in_one_stage_at_a_time() -> None:
    """It takes as long as on the devices of one stage, and the messages between them."""
    flags = sampled_by(tensor_parallel=2, group_size=1)
    one = plan_for("ppo", flags, "4x8xH100")
    two = plan_for("ppo", [*flags, "--rollout.pipeline-parallel-size", "4"], "4x8xH100")
    assert two.seconds["generate"] == pytest.approx(one.seconds["generate"])


@pytest.mark.parametrize(
    ("tensor_parallel", "stages", "nodes", "expected"),
    [(8, 1, 1, 1), (16, 1, 2, 2), (8, 2, 2, 1), (8, 4, 2, 1), (4, 2, 4, 2), (3, 2, 3, 2), (2, 3, 3, 1), (8, 3, 2, 2)],
)
def test_nodes_of_a_stage(tensor_parallel: int, stages: int, nodes: int, expected: int) -> None:
    """Of 24 devices on two nodes, the second of three stages has four on each."""
    engines = Engines(number=1, tensor_parallel=tensor_parallel, stages=stages, num_nodes=nodes, max_seqs=1)
    assert engines.nodes_of_stage == expected


def test_which_experts_tokens_used_is_in_host_memory() -> None:
    """A byte for each of 48 layers and 8 experts: of every token of an engine's KV cache, of those of the step that is
    sampled and the one that is learned from, and of their packed copy."""
    flags = shlex.split(
        "--policy.num-gpus-per-node 8 --policy.gradient-checkpointing --rollout.num-engines 4 --rollout.max-lag 1 "
        "--rollout.tensor-parallel-size 2 --reward.rules math --rollout.batch-size 64 --rollout.group-size 8 "
        "--rollout.max-prompt-tokens 1024 --rollout.max-response-tokens 3072"
    )
    without = plan_for("grpo", flags, "2x8xH200", QWEN_3_30B)
    plan = plan_for("grpo", [*flags, "--rollout.router-replay"], "2x8xH200", QWEN_3_30B)
    added = [ours.host_bytes - theirs.host_bytes for ours, theirs in zip(plan.groups, without.groups, strict=True)]
    in_flight = 3 * 64 * 8 * 4096 * 48 * 8
    assert added == [pytest.approx(in_flight), pytest.approx(4 * plan.cache_tokens * 48 * 8)]
