"""Feed-forward layers that compute a chunk of tokens at a time. Whole engines, and ranks with different numbers of
chunks under ZeRO-3, are in tests/integration/test_sequence_parallel.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection, ModelSection
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.models.chunked_mlp import chunk_feed_forward, chunked_layers, chunks_of
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.training.examined import examine
from rlhf.errors import ModelError
from rlhf.types import Head
from tests.families import tiny_family
from tests.models_page import one_rank

TOKENS = torch.arange(4, 23)[None]
WHERE = "policy.model"
CPU = torch.device("cpu")


def chunked(family: str, chunk_tokens: int, *, adapters: bool = False) -> PreTrainedModel:
    model = tiny_family(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # grouped products have no float64
    if adapters:
        torch.manual_seed(0)
        add_adapters(model, LoraSection(rank=4), seed=0, where="policy.lora.targets")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    chunk_feed_forward(model, ModelSection(mlp_chunk_tokens=chunk_tokens), WHERE)
    model.train()
    return model


def outputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The loss, and its gradients by the parameters' names."""
    log_probs = model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)
    loss = log_probs[0, :, 7].sum()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), **dict(zip(learning, found, strict=True))}


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "gpt_neox",
        "bloom",
        "mpt",
        "gemma2",
        "lfm2",
        "qwen3_moe",
        "gpt_oss",
        "llama4_text",
        "granitemoe",
    ],
)
@pytest.mark.parametrize("chunk_tokens", [4, 18])
def test_chunks_change_neither_outputs_nor_gradients(family: str, chunk_tokens: int) -> None:
    whole, found = outputs(chunked(family, 0)), outputs(chunked(family, chunk_tokens))
    assert whole.keys() == found.keys()
    for name, expected in whole.items():
        assert float((found[name] - expected).norm()) <= 1e-6 * float(expected.norm()), name


def test_adapters_learn_in_chunks() -> None:
    whole, found = outputs(chunked("llama", 0, adapters=True)), outputs(chunked("llama", 4, adapters=True))
    assert any("mlp" in name for name in whole)
    for name, expected in whole.items():
        assert float((found[name] - expected).norm()) <= 1e-6 * float(expected.norm()), name


def kept_widths(model: PreTrainedModel) -> set[tuple[int, ...]]:
    """Shapes of what autograd keeps for the backward pass."""
    kept: set[tuple[int, ...]] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=TOKENS, use_cache=False)
    return kept


def test_nothing_as_wide_as_the_feed_forward_layer_is_kept() -> None:
    num_tokens, width = TOKENS.shape[1], 96
    assert (1, num_tokens, width) in kept_widths(chunked("llama", 0))
    assert not [shape for shape in kept_widths(chunked("llama", 4)) if shape[-1] == width and num_tokens in shape]


def test_a_chunk_that_is_not_needed_costs_nothing() -> None:
    model = chunked("llama", 19)
    assert (1, 19, 96) in kept_widths(model)
    assert len(chunked_layers(model)) == 2
    with chunks_of(model, 18):
        assert (1, 19, 96) not in kept_widths(model)
    assert (1, 19, 96) in kept_widths(model)


@pytest.mark.parametrize("family", ["opt", "mamba"])
def test_a_model_without_known_feed_forward_layers_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"^policy.mlp_chunk_tokens: a \w+ has no feed-forward layer of a known name"):
        chunked(family, 4)


class Neighbors(nn.Module):
    """A feed-forward layer that also looks at the token before."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = nn.functional.pad(hidden, (0, 0, 1, -1))
        mixed: torch.Tensor = self.own(hidden + before)
        return mixed


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("mixes", [False, True])
def test_a_layer_that_looks_at_other_tokens_is_refused(mixes: bool) -> None:
    model, section = tiny_family("llama"), ModelSection(mlp_chunk_tokens=512)
    if mixes:
        layer = model.model.layers[1]
        layer.mlp = Neighbors(layer.mlp)
    chunk_feed_forward(model, section, WHERE)
    packed_model = PackedModel(model, Head.LOG_PROBS, LogitsRule(chunk_tokens=1024), where=WHERE)

    def test() -> None:
        examine(packed_model, section, dtype=torch.float32, device=CPU, where=WHERE)

    if not mixes:
        test()
        return
    with pytest.raises(ModelError, match=r"^policy.mlp_chunk_tokens: feed-forward layers of a LlamaForCausalLM do not"):
        test()
