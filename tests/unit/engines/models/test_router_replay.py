"""Router replay: a pass with given experts against one whose experts are forced by hand, in every packing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection, TrainedModelSection
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.models.checkpointing import checkpoint_layers
from rlhf.engines.models.chunked_mlp import chunk_feed_forward
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import ByLength, PackedPass, SequencePasses, SinglePasses, own_pace
from rlhf.engines.models.router_replay import RouterReplay, replayable_routers
from rlhf.engines.models.routers import routers_of, set_up_routers
from rlhf.errors import ModelError
from rlhf.types import ExpertArray, Head, IntArray, PackedTokens
from tests.families import tiny_family

CPU = torch.device("cpu")
LENGTHS = (7, 12, 5)
NUM_TOKENS = sum(LENGTHS)
NUM_ROUTERS, NUM_EXPERTS, TOP_K = 2, 4, 2
UNKNOWN = 255
SINGLE = SinglePasses(own_pace)
BY_LENGTH = ByLength(PackedPass(), 7, own_pace)
"""Runs the second sequence after the others."""
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe_text", "qwen2_moe", "olmoe")


def token_ids() -> IntArray:
    ids: IntArray = np.random.default_rng(0).integers(4, 120, NUM_TOKENS)
    return ids


def routes(seed: int = 1) -> ExpertArray:
    """[tokens, routers, top_k]: other experts than a model would choose, mostly; each sequence's last is unknown."""
    generator = np.random.default_rng(seed)
    order = generator.random((NUM_TOKENS, NUM_ROUTERS, NUM_EXPERTS)).argsort(-1)
    experts = order[:, :, :TOP_K].astype(np.uint8)
    experts[np.cumsum(LENGTHS) - 1] = UNKNOWN
    return experts


def packed_input(experts: ExpertArray | None, first: int = 0, last: int = len(LENGTHS)) -> PackedInput:
    """The sequences from `first` to `last` - 1. Two thirds of their tokens are learned from."""
    ends = np.cumsum((0, *LENGTHS))
    place = slice(ends[first], ends[last])
    wanted = np.random.default_rng(2).random(NUM_TOKENS) < 0.67
    return PackedInput.from_numpy(
        PackedTokens(
            token_ids=token_ids()[place],
            lengths=np.array(LENGTHS[first:last]),
            wanted=wanted[place],
            routed_experts=None if experts is None else experts[place],
        ),
        CPU,
    )


def replaying(
    model: PreTrainedModel, passes: SequencePasses = SINGLE, section: TrainedModelSection | None = None
) -> tuple[PackedModel, RouterReplay]:
    """As the training engine puts a model together."""
    section = section or TrainedModelSection()
    if section.lora.rank:
        add_adapters(model, section.lora, seed=0, where="policy.lora.targets")
    set_up_routers(model, section, "policy.model")
    packed_model = PackedModel(model.train(), Head.LOG_PROBS, LogitsRule())
    replay = RouterReplay(packed_model)
    chunk_feed_forward(model, section, "policy.model")
    checkpoint_layers(model, section, "policy.model", on_gpu=False)
    packed_model.passes = passes
    return packed_model, replay


@contextmanager
def forced(model: PreTrainedModel, experts: torch.Tensor) -> Iterator[None]:
    """Inside this block each router's weights of `experts` [T, routers, top_k] are computed by its published rule, with
    no top-k at all; -1 in the last token leaves it alone."""
    before = []
    for index, router in enumerate(routers_of(model)):
        module, forward = router.module, router.module.forward
        before.append((module, forward))
        module.forward = by_rule(module, experts[:, index])
    try:
        yield
    finally:
        for module, _ in before:
            del module.forward


def by_rule(module: nn.Module, experts: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    def forward(hidden: torch.Tensor) -> Any:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = nn.functional.linear(hidden, module.get_parameter("weight"), getattr(module, "bias", None))
        own = logits.argsort(-1, descending=True)[:, : experts.shape[1]]
        used = experts.where(experts >= 0, own)
        # Probabilities that are normalized again over the chosen ones are the softmax over these.
        is_normalized = getattr(module, "norm_topk_prob", True)
        scores = logits.gather(-1, used) if is_normalized else logits
        weights = scores.softmax(-1)
        return logits, weights if is_normalized else weights.gather(-1, used), used

    return forward


def forced_log_probs(model: PreTrainedModel, experts: ExpertArray) -> torch.Tensor:
    """[T], of each sequence alone by transformers' own forward."""
    parts = []
    known = torch.from_numpy(experts.astype(np.int64))
    known[known == UNKNOWN] = -1
    for ids, chosen in zip(torch.from_numpy(token_ids()).split(LENGTHS), known.split(LENGTHS), strict=True):
        with forced(model, chosen):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        found = logits[:-1].float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        parts.append(nn.functional.pad(found, (1, 0)))
    return torch.cat(parts)


def only_wanted(values: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(values).index_copy(0, packed_input(None).wanted, values[packed_input(None).wanted])


@pytest.mark.parametrize(
    ("family", "passes"),
    [*(("qwen3_moe", passes) for passes in (PackedPass(), BY_LENGTH)), *((family, SINGLE) for family in FAMILIES)],
)
def test_a_pass_uses_the_given_experts(family: str, passes: SequencePasses) -> None:
    expected = only_wanted(forced_log_probs(tiny_family(family).train(), routes()))
    packed_model, _ = replaying(tiny_family(family), passes)
    found = packed_model(packed_input(routes()))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    own = packed_model(packed_input(None))[0]
    assert float((own - expected).detach().abs().max()) > 0.05


def test_without_given_experts_a_pass_is_the_models_own() -> None:
    packed_model, _ = replaying(tiny_family("qwen3_moe"), PackedPass())
    packed_model(packed_input(routes()))
    plain = PackedModel(tiny_family("qwen3_moe").train(), Head.LOG_PROBS, LogitsRule())
    assert torch.equal(packed_model(packed_input(None)), plain(packed_input(None)))
    unknown = np.full_like(routes(), UNKNOWN)
    assert torch.equal(packed_model(packed_input(unknown)), plain(packed_input(None)))


SETTINGS: tuple[dict[str, object], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": "offload"},
    {"mlp_chunk_tokens": 5},
    {"mlp_chunk_tokens": 5, "gradient_checkpointing": True},
    {"float32_router": True},
)


@pytest.mark.parametrize("passes", [PackedPass(), SINGLE, BY_LENGTH])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_is_that_of_forced_experts(settings: dict[str, object], passes: SequencePasses) -> None:
    """Of all parameters, routers among them; what is computed again in the backward pass uses the same experts."""
    weights = torch.from_numpy(np.random.default_rng(3).normal(size=NUM_TOKENS).astype(np.float32))
    by_hand = tiny_family("qwen3_moe").train()
    (weights * only_wanted(forced_log_probs(by_hand, routes()))).sum().backward()
    packed_model, _ = replaying(tiny_family("qwen3_moe"), passes, TrainedModelSection.model_validate(settings))
    (weights * packed_model(packed_input(routes()))[0]).sum().backward()
    found = dict(packed_model.model.named_parameters())
    for name, parameter in by_hand.named_parameters():
        expected, gradient = parameter.grad, found[name].grad
        assert expected is not None, name
        assert gradient is not None, name
        assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()), name
    gates = [float(found[name].grad.norm()) for name in found if name.endswith("gate.weight")]  # type: ignore[union-attr]
    assert len(gates) == NUM_ROUTERS
    assert min(gates) > 1e-3


def test_adapters_learn_with_given_experts() -> None:
    section = TrainedModelSection(
        lora=LoraSection(rank=2, targets=("q_proj", "experts.gate_up_proj")), gradient_checkpointing=True
    )
    packed_model, replay = replaying(tiny_family("qwen3_moe"), PackedPass(), section)
    expected = only_wanted(forced_log_probs(tiny_family("qwen3_moe").train(), routes()))
    found = packed_model(packed_input(routes()))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # new adapters add nothing
    found.sum().backward()
    assert any(parameter.grad is not None for parameter in packed_model.model.parameters())
    assert replay.num_replayed > 0


@pytest.mark.parametrize("passes", [PackedPass(), SINGLE, BY_LENGTH])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (2, 3), (0, 2)])
def test_a_sequence_alone_and_in_a_pack_are_equal(passes: SequencePasses, first: int, last: int) -> None:
    packed_model, _ = replaying(tiny_family("qwen3_moe"), passes)
    ends = np.cumsum((0, *LENGTHS))
    with torch.no_grad():
        alone = packed_model(packed_input(routes(), first, last))[0]
        together = packed_model(packed_input(routes()))[0][ends[first] : ends[last]]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", [PackedPass(), SINGLE, BY_LENGTH])
def test_experts_of_the_neighbor_token_are_other_experts(passes: SequencePasses) -> None:
    packed_model, _ = replaying(tiny_family("qwen3_moe"), passes)
    shifted = np.roll(routes(), 1, axis=0)
    right, wrong = (packed_model(packed_input(experts))[0] for experts in (routes(), shifted))
    assert float((right - wrong).detach().abs().max()) > 0.05


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("passes", [PackedPass(), SINGLE, BY_LENGTH])
def test_what_is_counted(passes: SequencePasses, settings: dict[str, object]) -> None:
    """Over the tokens whose outputs are learned from: those before the wanted ones."""
    packed_model, replay = replaying(tiny_family("qwen3_moe"), passes, TrainedModelSection.model_validate(settings))
    packed_model(packed_input(np.full_like(routes(), UNKNOWN)))
    assert (replay.num_replayed, replay.num_changed) == (0.0, 0.0)
    experts = routes()
    experts[3] = UNKNOWN
    is_known = torch.from_numpy(experts[:, 0, 0] != UNKNOWN)[packed_input(experts).wanted - 1]
    packed_model(packed_input(experts)).sum().backward()
    assert replay.num_replayed == float(is_known.sum())
    assert replay.num_replayed > 0
    assert 0.0 < replay.num_changed <= replay.num_replayed
    packed_model(packed_input(None))
    assert (replay.num_replayed, replay.num_changed) == (0.0, 0.0)


def test_a_choice_that_is_the_models_own_changes_nothing() -> None:
    packed_model, replay = replaying(tiny_family("qwen3_moe"), PackedPass())
    said: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_hook(lambda module, inputs, outputs: said.append(outputs[-1]))
        for router in routers_of(packed_model.model)
    ]
    expected = packed_model(packed_input(None))
    for hook in hooks:
        hook.remove()
    own = torch.stack(said, dim=1).numpy().astype(np.int16)
    found = packed_model(packed_input(own))
    assert torch.equal(found, expected)
    assert (replay.num_replayed, replay.num_changed) == (float(len(packed_input(None).wanted)), 0.0)
    row = own[packed_input(None).wanted[0] - 1, 1]
    row[:] = row[::-1].copy()
    packed_model(packed_input(own))
    assert replay.num_changed == 0.0  # the order of a token's experts does not count
    row[0] = min({*range(NUM_EXPERTS)} - {*row.tolist()})
    packed_model(packed_input(own))
    assert replay.num_changed == 0.5  # one of two routers


def test_experts_of_another_model_are_refused() -> None:
    packed_model, _ = replaying(tiny_family("qwen3_moe"))
    with pytest.raises(ModelError, match=r"\[24, 1, 2\].*needs \[24, 2, 2\]"):
        packed_model(packed_input(routes()[:, :1]))


@pytest.mark.parametrize(
    ("family", "why"),
    [("llama", "a LlamaForCausalLM has no routers"), ("deepseek_v3", "routers of a DeepseekV3ForCausalLM do not")],
)
def test_models_without_such_routers_are_refused_by_name(family: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"rollout.router_replay: {why}"):
        replayable_routers(tiny_family(family))
