"""Routers of mixtures of experts: what is recorded of them against transformers' own load-balancing loss, freezing,
and float32."""

import inspect

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.models.adapter_names import may_stay_unchanged
from rlhf.engines.models.chunked_mlp import chunk_feed_forward
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import ByLength, PackedPass, SequencePasses, SinglePasses, own_pace
from rlhf.engines.models.router_record import RouterRecord
from rlhf.engines.models.routers import BALANCING, expert_lists, num_chosen, routers_of, set_up_routers
from rlhf.errors import ModelError
from rlhf.types import Head, PackedTokens
from tests.families import tiny_family

CPU = torch.device("cpu")
LENGTHS = (7, 12, 5)
SINGLE = SinglePasses(own_pace)
BY_LENGTH = ByLength(PackedPass(), 7, own_pace)
"""Runs the second sequence after the others."""


def packed_input() -> PackedInput:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 120, (sum(LENGTHS),), generator=generator).numpy()
    wanted = torch.rand(len(ids), generator=generator).numpy() < 0.6
    lengths = torch.tensor(LENGTHS).numpy()
    return PackedInput.from_numpy(PackedTokens(token_ids=ids, lengths=lengths, wanted=wanted), CPU)


def balance(record: RouterRecord, num_tokens: int) -> torch.Tensor:
    num_pairs = num_tokens * record.num_routers
    return len(record.chosen) * (record.chosen / num_pairs * record.probabilities / num_pairs).sum()


def balance_of_transformers(model: PreTrainedModel, packed: PackedInput) -> torch.Tensor:
    """By its own function, on the logits that it records for each sequence alone."""
    logits = [
        model(input_ids=one[None], output_router_logits=True, use_cache=False).router_logits
        for one in packed.token_ids.split(packed.lengths)
    ]
    layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    is_learned = torch.zeros(1, len(packed.token_ids), dtype=torch.int64)
    is_learned[0, packed.wanted] = 1
    source = inspect.getmodule(type(model))
    loss: torch.Tensor = vars(source)[BALANCING](layers, layers[0].shape[-1], num_chosen(model, ""), is_learned)
    return loss


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        *(("qwen3_moe", passes) for passes in (PackedPass(), SINGLE, BY_LENGTH)),
        *((family, SINGLE) for family in ("mixtral", "gpt_oss", "qwen3_5_moe_text", "granitemoe", "jamba", "minimax")),
    ],
)
def test_the_balance_is_that_of_transformers(family: str, passes: SequencePasses) -> None:
    model, packed = tiny_family(family).train(), packed_input()
    expected = balance_of_transformers(model, packed)
    packed_model = PackedModel(model, Head.LOG_PROBS, LogitsRule())
    packed_model.passes = passes
    record = RouterRecord(packed_model, routers_of(model), num_chosen(model, ""))
    packed_model(packed)
    torch.testing.assert_close(balance(record, len(packed.wanted)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("chunk_tokens", [0, 5])
def test_its_gradient_is_that_of_transformers(recomputes: bool, chunk_tokens: int) -> None:
    model, packed = tiny_family("qwen3_moe").train(), packed_input()
    gate = model.get_parameter("model.layers.0.mlp.gate.weight")
    (expected,) = torch.autograd.grad(balance_of_transformers(model, packed), gate)
    chunk_feed_forward(model, ModelSection(mlp_chunk_tokens=chunk_tokens), "policy.model")
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed_model = PackedModel(model, Head.LOG_PROBS, LogitsRule())
    record = RouterRecord(packed_model, routers_of(model), 2)
    outputs = packed_model(packed)
    (balance(record, len(packed.wanted)) + 0.0 * outputs.sum()).backward()
    assert gate.grad is not None
    assert float((gate.grad - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize(("family", "kind"), [("llama", "Llama"), ("deepseek_v3", "DeepseekV3")])
def test_a_model_without_a_balancing_loss_is_refused_by_name(family: str, kind: str) -> None:
    with pytest.raises(ModelError, match=rf"policy.model: algo.router_aux_coef needs .* a {kind}ForCausalLM"):
        num_chosen(tiny_family(family), "policy.model")


def test_frozen_routers_alone_do_not_learn() -> None:
    model = tiny_family("qwen3_moe")
    set_up_routers(model, TrainedModelSection(freeze_router=True), "policy.model")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]


@pytest.mark.parametrize(("family", "why"), [("llama", "has no routers"), ("doge", "is no module of its own")])
def test_what_has_no_router_of_its_own_is_refused_by_name(family: str, why: str) -> None:
    changes = {"is_moe": True} if family == "doge" else {}
    with pytest.raises(ModelError, match=f"policy.freeze_router: .*{why}"):
        set_up_routers(tiny_family(family, changes), TrainedModelSection(freeze_router=True), "policy.model")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "jamba", "deepseek_v3"])
def test_routers_compute_in_float32_inside_a_bfloat16_model(family: str) -> None:
    """Against the same product in float32 by hand; what the experts get stays in the model's format."""
    model = tiny_family(family, dtype=torch.bfloat16)
    set_up_routers(model, ModelSection(float32_router=True), "reference.model")
    router = routers_of(model)[0]
    given: list[torch.Tensor] = []
    said: list[object] = []
    router.module.register_forward_pre_hook(lambda module, inputs: given.extend(inputs))
    router.module.register_forward_hook(lambda module, inputs, outputs: said.append(outputs))
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(4, 20)[None], use_cache=False)
    outputs = said[0] if isinstance(said[0], tuple) else (said[0],)
    logits = outputs[router.place]
    parameters = {name.rpartition(".")[2]: p.float() for name, p in router.module.named_parameters()}
    hidden = given[0].float().reshape(-1, given[0].shape[-1])
    expected = torch.nn.functional.linear(hidden, parameters["weight"], parameters.get("bias"))
    torch.testing.assert_close(logits.reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)
    assert logits.dtype == torch.float32
    floats = [one.dtype for i, one in enumerate(outputs) if i != router.place and one.is_floating_point()]
    assert set(floats) <= {torch.bfloat16}
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_an_idle_expert_is_no_parameter_that_should_have_moved() -> None:
    assert may_stay_unchanged("model.layers.0.mlp.experts.11.up_proj.weight")
    for name in ("experts.gate_up_proj", "shared_experts.up_proj.weight", "gate.weight", "layers.3.up_proj.weight"):
        assert not may_stay_unchanged(f"model.layers.0.mlp.{name}")


def test_experts_in_lists_are_found() -> None:
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model = torch.nn.ModuleDict({"layer": block, "other": torch.nn.Linear(2, 2)})
    assert expert_lists(model) == ["layer"]
    assert expert_lists(tiny_family("qwen3_moe")) == []
