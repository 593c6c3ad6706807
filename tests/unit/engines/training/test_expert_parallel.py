"""What AutoEP makes of a model, on one rank, and how that is seen and compared. What expert parallelism relies on in
DeepSpeed and in transformers, and why something is refused with it: a test that fails here for a newer DeepSpeed says
that a reason may be gone. What ranks compute together is in tests/integration/test_expert_parallel.py."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

from rlhf.config.expert_families import FLOAT32_ROUTERS, SPLIT_FAMILIES
from rlhf.config.models import TrainedModelSection
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.routers import routers_of
from rlhf.engines.models.split_experts import num_holders, split_layers
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.training.expert_parallel import BeforeSplit, set_up_split_routers, with_expert_parallelism
from rlhf.engines.training.held_tensors import held_tensors
from rlhf.errors import ModelError
from rlhf.types import Head
from tests.families import tiny_family

ENGINE = deepspeed.runtime.engine.DeepSpeedEngine
SECTION = TrainedModelSection(expert_parallel_size=2, num_gpus_per_node=2)
WHERE = "policy.model"
IN_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def packed(family: str) -> PackedModel:
    return PackedModel(tiny_family(family), Head.LOG_PROBS, LogitsRule(chunk_tokens=1024), where=WHERE)


def split(packed_model: PackedModel) -> None:
    """What DeepSpeed's engine does where all experts are on one rank."""
    config = with_expert_parallelism({}, packed_model, SECTION, **IN_FLOAT32, where=WHERE)
    assert isinstance(config["expert_parallel"], Mapping)
    autoep = AutoEP(packed_model, parse_autoep_config(dict(config["expert_parallel"])))
    autoep.replace_moe_layers(autoep.ep_parser(), ep_size=1, ep_rank=0)
    for layer in split_layers(packed_model).values():
        vars(layer)["ep_group"] = dist.group.WORLD
    set_up_split_routers(packed_model.model, SECTION, WHERE)


def whole(packed_model: PackedModel) -> dict[str, torch.Tensor]:
    found = {}
    for name, held in held_tensors(packed_model.model).items():
        with held.whole() as tensor:
            assert held.layout.shape == tensor.shape
            assert held.layout.dtype == tensor.dtype
            found[name] = tensor.detach().clone()
    return found


def before(packed_model: PackedModel) -> BeforeSplit:
    return BeforeSplit.of(packed_model, **IN_FLOAT32, tolerance=1e-4, shared_by=1)


@pytest.mark.parametrize("family", sorted(SPLIT_FAMILIES))
def test_split_experts_have_the_tensors_and_outputs_of_the_model(family: str) -> None:
    packed_model = packed(family)
    for name, buffer in packed_model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.5, 0.5)
    right, unsplit, routers = whole(packed_model), before(packed_model), routers_of(packed_model.model)
    split(packed_model)
    assert len(split_layers(packed_model)) == len(routers) > 0
    assert num_holders(packed_model) == 1
    found = whole(packed_model)
    assert found.keys() == right.keys()
    assert [name for name in found if not torch.equal(found[name], right[name])] == []
    unsplit.require_same(packed_model, packed_model, WHERE)
    assert [router.name for router in routers_of(packed_model.model)] == [
        f"{one.name[:-5]}.router.gate" for one in routers
    ]


@pytest.mark.parametrize("part", ["experts.w1", "experts.w2", "experts.w3", "router.gate.weight"])
def test_other_outputs_are_refused(part: str) -> None:
    packed_model = packed("qwen3_moe")
    unsplit = before(packed_model)
    split(packed_model)
    layer = next(iter(split_layers(packed_model).values()))
    layer.get_parameter(part).data.mul_(1.1)
    with pytest.raises(
        ModelError, match=r"^policy.expert_parallel_size: AutoEP computes something else than a Qwen3Mo"
    ):
        unsplit.require_same(packed_model, packed_model, WHERE)


def test_outputs_that_are_not_numbers_are_refused() -> None:
    packed_model = packed("mixtral")
    unsplit = before(packed_model)
    with pytest.raises(ModelError, match=r"^policy.expert_parallel_size: AutoEP computes something else"):
        unsplit.require_same(lambda one: packed_model(one) * torch.nan, packed_model, WHERE)  # type: ignore[arg-type]


def test_other_tensors_are_refused() -> None:
    packed_model = packed("mixtral")
    unsplit = before(packed_model)
    split(packed_model)
    layer = next(iter(split_layers(packed_model).values()))
    layer.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match=r"AutoEP leaves a MixtralForCausalLM with other tensors \(model.*mlp.more\)"):
        unsplit.require_same(packed_model, packed_model, WHERE)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^policy.expert_parallel_size: DeepSpeed's AutoEP does not know a olmoe"):
        with_expert_parallelism({}, packed("olmoe"), SECTION, **IN_FLOAT32, where=WHERE)


def test_frozen_routers_stay_frozen() -> None:
    packed_model = packed("deepseek_v3")
    for router in routers_of(packed_model.model):
        router.module.requires_grad_(False)
    split(packed_model)
    gates = [router.module.weight for router in routers_of(packed_model.model)]
    assert gates
    assert not any(isinstance(weight, torch.Tensor) and weight.requires_grad for weight in gates)


def test_the_families_are_those_that_autoep_has_presets_for() -> None:
    known = {name for preset in PRESET_MODELS.values() for name in preset.hf_model_types}
    assert known == SPLIT_FAMILIES
    assert {preset.expert_w3 for preset in PRESET_MODELS.values()} == {None}


@pytest.mark.parametrize("family", sorted(SPLIT_FAMILIES))
def test_experts_of_a_family_are_where_autoep_looks(family: str) -> None:
    model = tiny_family(family)
    (preset,) = (one for one in PRESET_MODELS.values() if family in one.hf_model_types)
    routers = routers_of(model)
    assert routers
    for router in routers:
        block, _, name = router.name.rpartition(".")
        assert (name, block.rpartition(".")[2]) == (preset.router_pattern, "mlp")
        experts = model.get_submodule(f"{block}.{preset.experts_pattern}")
        assert {name for name, _ in experts.named_parameters()} == {preset.expert_w1, preset.expert_w2}
        others = {name for name, _ in model.get_submodule(block).named_children()} - {"gate", "experts", "act_fn"}
        shared = {preset.shared_experts_pattern, preset.shared_experts_gate_pattern}
        assert others <= shared


@pytest.mark.parametrize("family", sorted(SPLIT_FAMILIES))
def test_which_routers_compute_in_float32(family: str) -> None:
    model = tiny_family(family, dtype=torch.bfloat16)
    router = routers_of(model)[0]
    weight = router.module.weight
    assert isinstance(weight, torch.Tensor)
    outputs = router.module(torch.ones(1, 3, weight.shape[1], dtype=torch.bfloat16))
    assert (outputs[router.place].dtype == torch.float32) == (family in FLOAT32_ROUTERS)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("_save_moe_checkpoint", "does not support frozen expert"),
        ("_validate_zero3_moe_compatibility", "does not support hpZeRO secondary tensor groups"),
    ],
)
def test_why_lora_and_second_partitions_are_refused(method: str, reason: str) -> None:
    assert reason in inspect.getsource(getattr(ENGINE, method))


def test_why_router_replay_is_refused() -> None:
    """The layer asks its own router, and takes nothing but hidden states."""
    assert list(inspect.signature(AutoEPMoELayer.forward).parameters) == ["self", "hidden_states"]
    assert "self.router(x, self.expert_bias)" in inspect.getsource(AutoEPMoELayer._forward)
