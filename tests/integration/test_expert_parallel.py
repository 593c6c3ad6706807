"""Ranks that have the experts of each layer among them: every family that DeepSpeed's AutoEP knows computes what it
computes alone, what leaves the ranks is the whole model, and a checkpoint restores them to the bit. What the ranks
compute together with other settings is in test_sequence_parallel.py, and a case of it runs always."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.expert_families import SPLIT_FAMILIES
from tests.families import tiny_family
from tests.integration.ports import held_port
from tests.integration.rank_processes import RankProcesses
from tests.tiny_models import FAMILIES, make_family, tiny_tokenizer

TIMEOUT_S = 900
KEPT = ("qwen3_moe", "deepseek_v3")
"""Families whose ranks send, save and resume."""
GROUPED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "qwen2_moe": {"norm_topk_prob": True},
}
"""Settings of routers that the tiny models do not have otherwise."""
NUM_RANKS = 4
SIZES = (1, 2, 4)

pytestmark = [
    pytest.mark.timeout(1000),
    pytest.mark.skipif(
        os.environ.get("RLHF_TEST_EXPERT_PARALLEL") != "all",
        reason="minutes on four ranks: RLHF_TEST_EXPERT_PARALLEL=all, every night",
    ),
]


def make_model(folder: Path, family: str) -> None:
    if family in FAMILIES:
        make_family(folder, family, **GROUPED.get(family, {}))
        return
    tiny_family(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def computed(
    tmp_path_factory: pytest.TempPathFactory, rank_processes: RankProcesses
) -> dict[str, dict[str, torch.Tensor]]:
    """What every family computes, by case."""
    folder = tmp_path_factory.mktemp("families")
    cases = []
    for family in sorted(SPLIT_FAMILIES):
        make_model(folder / family, family)
        kinds = ("", "-split2", "-split4", "-bfloat16", "-bfloat16-split2")
        cases += [f"{family}-log_probs-1-3-40{kind}" for kind in kinds]
    with held_port() as port:
        ranks = [(rank, NUM_RANKS, port, folder, *cases) for rank in range(NUM_RANKS)]
        rank_processes.run("sequence_parallel_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / f"results_{NUM_RANKS}.safetensors").items():
        case, _, key = name.partition("/")
        found.setdefault(case, {})[key] = value
    return found


@pytest.mark.parametrize("family", sorted(SPLIT_FAMILIES))
@pytest.mark.parametrize("size", [2, 4])
def test_a_family_computes_what_it_computes_alone(
    computed: dict[str, dict[str, torch.Tensor]], family: str, size: int
) -> None:
    alone, split = computed[f"{family}-log_probs-1-3-40"], computed[f"{family}-log_probs-1-3-40-split{size}"]
    torch.testing.assert_close(split["outputs"], alone["outputs"], rtol=1e-5, atol=1e-5)
    for key in ("loss", "norm", "second_norm"):
        torch.testing.assert_close(split[key], alone[key], rtol=1e-5, atol=1e-6)
    assert int(split["num_unmoved"]) == int(alone["num_unmoved"])
    gradients = [name for name in alone if name.startswith("grad/")]
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in gradients)
    assert {name for name in split if name.startswith("grad/")} == set(gradients)
    largest = max(float(alone[name].norm()) for name in gradients)
    for name in gradients:
        # Decays of linear attention have gradients that are differences of large numbers.
        bound = 1e-5 * float(alone[name].norm()) + 1e-7 * largest * (family == "qwen3_5_moe_text")
        assert float((split[name] - alone[name]).norm()) <= bound, name


@pytest.mark.parametrize("family", sorted(SPLIT_FAMILIES))
def test_in_bfloat16_a_family_is_as_close_to_float32_as_alone(
    computed: dict[str, dict[str, torch.Tensor]], family: str
) -> None:
    right = computed[f"{family}-log_probs-1-3-40"]
    alone, split = (computed[f"{family}-log_probs-1-3-40-bfloat16{kind}"] for kind in ("", "-split2"))
    names = [name for name in right if name.startswith("grad/")]

    def error(found: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((found[name].float() - right[name]).square().sum()) for name in names))

    assert error(split) <= 1.5 * error(alone)
    ours, theirs = ((one["outputs"] - right["outputs"]).abs().mean() for one in (split, alone))
    assert float(ours) <= 1.5 * float(theirs)


@pytest.fixture(scope="module", params=KEPT)
def kept(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, rank_processes: RankProcesses
) -> dict[int, Path]:
    """What ranks of one family sent, saved and exported, by the size of the groups that have the experts."""
    folder, family = tmp_path_factory.mktemp("kept"), request.param
    make_model(folder / family, family)
    cases = [f"{family}-{size}" for size in SIZES]
    with held_port() as port:
        ranks = [(rank, NUM_RANKS, port, folder, *cases) for rank in range(NUM_RANKS)]
        rank_processes.run("expert_parallel_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    return {size: folder / f"{family}-{size}" for size in SIZES}


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "said.json").read_text())
    return found


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_fresh_model_leaves_the_ranks_as_it_came(kept: dict[int, Path], size: int) -> None:
    alone, split = (kept[one] / "fresh" for one in (1, size))
    assert (split / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert (split / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    for kind in ("held", "stored"):
        sent = [(kept[one] / f"fresh_{kind}.safetensors").read_bytes() for one in (1, size)]
        assert sent[0] == sent[1]


@pytest.mark.parametrize("size", SIZES)
def test_engines_get_what_is_exported(kept: dict[int, Path], size: int) -> None:
    sent = load_file(kept[size] / "stepped_stored.safetensors")
    exported = load_file(kept[size] / "stepped" / "model.safetensors")
    fresh = load_file(kept[size] / "fresh" / "model.safetensors")
    assert {name for name in exported if name not in sent} == {name for name in exported if "correction_bias" in name}
    assert [name for name, tensor in sent.items() if not torch.equal(tensor, exported[name])] == []
    assert [name for name, tensor in sent.items() if torch.equal(tensor, fresh[name])] == []


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_step_moves_the_model_as_alone(kept: dict[int, Path], size: int) -> None:
    alone, split = (load_file(kept[one] / "stepped_held.safetensors") for one in (1, size))
    assert list(alone) == list(split)
    for name, tensor in alone.items():
        assert float((split[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
    for figure in ("norm 0", "norm 1", "moved ema"):
        assert said(kept[size])[figure] == pytest.approx(said(kept[1])[figure], rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_restores_the_ranks_to_the_bit(kept: dict[int, Path], size: int) -> None:
    went_on, resumed, stepped = (
        (kept[size] / name / "model.safetensors").read_bytes() for name in ("went_on", "resumed", "stepped")
    )
    assert went_on == resumed
    assert went_on != stepped


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_checkpoint_of_other_groups_is_refused(kept: dict[int, Path], size: int) -> None:
    assert said(kept[size])["refused"].endswith(f"saved: saved with expert_parallel_size {size}, now 1.")
