"""The nearest settings that fit, and better placements."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from rlhf.planning.edits import as_flags, changes, edited
from rlhf.planning.fixes import Planner, suggest_fixes, suggest_placement_fixes
from rlhf.planning.hardware import parse_cluster
from rlhf.planning.plan import Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import sections
from rlhf.planning.suggest import Suggestion, groupings, suggest
from rlhf.types import Role
from tests.unit.planning.support import LLAMA_3_8B, LLAMA_3_70B, RUN, shape_of

Search = Callable[[], list[Suggestion]]


def run_of(command: str, flags: str, cluster: str) -> tuple[TrainConfig, Planner, Search]:
    """A run, what plans it, and the search for a better one."""
    config = load_config(command, [*shlex.split(flags), *RUN], {})
    needs = build_algorithm(config.algo).needs
    shapes = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_8B))
    shape = parse_cluster(cluster)

    def planner(candidate: TrainConfig) -> Plan:
        return plan_run(candidate, needs, shapes, shape)

    def search() -> list[Suggestion]:
        assert isinstance(config, OnlineConfig)
        return suggest(config, planner, shape, list(shapes))

    return config, planner, search


@pytest.mark.parametrize(
    ("command", "flags", "cluster", "edits"),
    [
        ("sft", "", "8xH100", {"policy.num_gpus_per_node": 4}),
        ("sft", "", "1xH100", {"policy.offload_optimizer": True}),
        (
            "sft",
            "--policy.num-gpus-per-node 8 --data.max-tokens 262144 --policy.gradient-checkpointing",
            "8xH100",
            {"policy.sequence_parallel_size": 4},
        ),
        (
            "sft",
            "--policy.num-gpus-per-node 8 --data.max-tokens 1048576 --policy.gradient-checkpointing "
            "--policy.sequence-parallel-size 8",
            "8xH100",
            {"policy.mlp_chunk_tokens": 4096},
        ),
        (
            "sft",
            "--policy.num-gpus-per-node 8 --data.max-tokens 1310720 --policy.gradient-checkpointing "
            "--policy.sequence-parallel-size 8 --policy.mlp-chunk-tokens 4096",
            "8xH100",
            {"policy.gradient_checkpointing": "offload"},
        ),
        (
            "sft",
            "--policy.num-gpus-per-node 8 --data.max-tokens 4096 --train.max-tokens-per-micro-batch 16384",
            "8xH100",
            {"policy.gradient_checkpointing": True},
        ),
        (
            "grpo",
            "--policy.num-gpus-per-node 8 --rollout.num-engines 8 --colocate all --reward.rules math "
            "--policy.gradient-checkpointing",
            "8xH100",
            {"rollout.gpu_memory_utilization": 0.7},
        ),
    ],
)
def test_the_least_costly_edit_that_suffices(command: str, flags: str, cluster: str, edits: dict[str, object]) -> None:
    config, planner, _ = run_of(command, flags, cluster)
    assert not planner(config).fits
    mended = suggest_fixes(config, planner)
    assert mended == edits
    assert planner(edited(config, mended)).fits


def test_several_edits_where_none_is_enough_and_only_those_that_count() -> None:
    flags = "--data.max-tokens 8192 --train.max-tokens-per-micro-batch 32768 --policy.lr 1e-5"
    config, planner, _ = run_of("sft", flags, "2xH100")
    mended = suggest_fixes(config, planner)
    assert mended is not None
    assert len(mended) > 1
    assert planner(edited(config, mended)).fits
    for key in mended:
        assert not planner(edited(config, {k: v for k, v in mended.items() if k != key})).fits, key


def test_what_nothing_mends() -> None:
    config, planner, _ = run_of("sft", "", "1xL4")
    assert suggest_fixes(config, planner) is None


@pytest.mark.parametrize(
    ("flags", "cluster", "said"),
    [
        ("--reward.model org/rm", "4xH100", "--cluster.colocate policy,reference"),
        ("--reward.model org/rm", "3xH100", "--cluster.colocate policy,reference --cluster.colocate critic,reward"),
        ("--reward.model org/rm", "1xH100", "--cluster.colocate all"),
    ],
)
def test_merges_make_room(flags: str, cluster: str, said: str) -> None:
    config, planner, _ = run_of("ppo", flags, cluster)
    with pytest.raises(ConfigError, match="needs 1 device; free are 0 on node 0"):
        planner(config)
    edits = suggest_placement_fixes(config, planner)
    assert edits is not None
    assert as_flags(edits) == said
    planner(edited(config, edits))


def test_fewer_devices_where_merges_are_not_enough() -> None:
    config, planner, _ = run_of("sft", "--policy.num-gpus-per-node 8", "4xH100")
    assert suggest_placement_fixes(config, planner) == {"policy.num_gpus_per_node": 4}


def test_an_edit_reaches_a_listed_source() -> None:
    flags = ["--reward.sources", "[{type: model, model: org/rm}]", *RUN]
    config = load_config("ppo", flags, {})
    other = edited(config, {"reward.sources.0.num_nodes": 2, "run.name": "other"})
    assert isinstance(other, OnlineConfig)
    assert (other.models["reward.sources.0"].num_nodes, other.run.name) == (2, "other")
    assert changes(config, {"run.name": "run", "run.seed": 3}) == {"run.seed": 3}


def test_suggestions_fit_are_ordered_and_differ() -> None:
    config, planner, search = run_of("ppo", "--reward.model org/rm", "2x8xH100")
    found = search()
    assert len(found) == 3
    plans = [planner(edited(config, suggestion.edits)) for suggestion in found]
    assert all(plan.fits for plan in plans)
    assert [plan.step_s for plan in plans] == sorted(plan.step_s for plan in plans)
    assert len({tuple(group.name for group in plan.placement.groups) for plan in plans}) == 3


def test_a_search_does_not_look_for_the_largest_micro_batch_of_each_placement() -> None:
    """That takes longer than the rest of a plan, and only the plan that is shown says it."""
    config, planner, _ = run_of("grpo", "--reward.rules math", "8xH100")
    asked: list[Plan] = []

    def watched(candidate: TrainConfig) -> Plan:
        plan = planner(candidate)

        def find() -> int:
            asked.append(plan)
            return plan.find_fitting_tokens()

        return replace(plan, find_fitting_tokens=find)

    assert isinstance(config, OnlineConfig)
    found = suggest(config, watched, parse_cluster("8xH100"), [Role.POLICY, Role.REFERENCE])
    assert asked == []
    assert found[0].plan.fitting_tokens > 0
    assert len(asked) == 1


def test_a_listed_reward_model_is_placed_by_its_own_key() -> None:
    _, _, search = run_of("grpo", "--reward.sources '[{type: model, model: org/rm}]'", "8xH100")
    assert any("reward.sources.0.num_gpus_per_node" in found.edits for found in search())


def test_a_suggestion_says_only_what_changes() -> None:
    config, _, search = run_of("grpo", "--reward.rules math", "8xH100")
    for suggestion in search():
        assert changes(config, suggestion.edits) == suggestion.edits


def test_suggestions_beat_a_poor_placement() -> None:
    flags = "--reward.rules math --policy.num-gpus-per-node 2 --policy.gradient-checkpointing --rollout.num-engines 6"
    config, planner, search = run_of("grpo", flags, "8xH100")
    assert search()[0].plan.step_s < planner(config).step_s


def test_groupings_hold_every_role_once() -> None:
    roles = (Role.POLICY, Role.CRITIC, Role.REFERENCE, Role.REWARD)
    found = groupings(roles)
    assert len(found) == 3
    for grouping in found:
        assert sorted(role for group in grouping for role in group) == sorted(roles)
    assert groupings((Role.POLICY,)) == [[(Role.POLICY,)]]


def test_engines_are_spread_over_nodes_only_where_nothing_else_fits() -> None:
    """A 70B model in bfloat16 takes 140 GB, and a node here has one GPU of 80."""
    for model, nodes in ((LLAMA_3_70B, {2, 4}), (LLAMA_3_8B, {1})):
        config = load_config("grpo", ["--reward.rules", "math", *RUN], {})
        shapes = {Role.POLICY: shape_of(model), Role.REFERENCE: shape_of(model)}
        cluster = parse_cluster("64x1xH100")
        assert isinstance(config, OnlineConfig)
        needs = build_algorithm(config.algo).needs
        found = suggest(config, partial(plan_run, needs=needs, shapes=shapes, cluster=cluster), cluster, list(shapes))
        assert {edited(config, one.edits).rollout.num_nodes_per_engine for one in found} <= nodes
        assert found


def test_an_engine_that_fits_on_no_node_gets_several() -> None:
    """Two GPUs would have its weights, and no room for a KV cache."""
    flags = ["--reward.rules=math", "--policy.num-nodes=32", "--policy.gradient-checkpointing", "--policy.zero-stage=3"]
    flags += ["--reference.num-nodes=16", "--reference.zero-stage=3"]
    config = load_config("grpo", [*flags, *RUN], {})
    assert isinstance(config, OnlineConfig)
    needs, cluster = build_algorithm(config.algo).needs, parse_cluster("64x1xH100")
    shapes = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_70B))
    planner = partial(plan_run, needs=needs, shapes=shapes, cluster=cluster)
    assert not planner(config).fits
    edits = suggest_fixes(config, planner)
    assert edits == {"rollout.tensor_parallel_size": 4, "rollout.num_nodes_per_engine": 4}
