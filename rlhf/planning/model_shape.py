"""The size of a transformer and the cost of a token in it, from its config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What config.json does not say about the layers of a model type."""

    num_norms: int = 2
    """Norms of the hidden size in a layer."""
    qkv_bias: bool = False
    all_bias: bool = False
    """Every matrix and norm has a bias."""
    gated: bool = True
    """The feed-forward layer has three matrices instead of two."""
    head_norms: bool = False
    """Queries and keys are normalized head by head."""
    tied: bool = False
    """The output layer is the table of embeddings, unless config.json says otherwise."""
    learnt_positions: bool = False


FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(all_bias=True, gated=False, tied=True, learnt_positions=True),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "qwen3_moe": Family(head_norms=True),
    "gemma": Family(tied=True),
    "gemma2": Family(tied=True, num_norms=4),
    "gemma3_text": Family(tied=True, num_norms=4, head_norms=True),
}
"""Model types whose layers differ from Llama's."""
LLAMA = Family()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only transformer. Counts are numbers, not bytes."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the feed-forward layer; with experts, of all those that one token uses."""
    vocab: int
    layer_parameters: int
    """Of one layer, with all its experts."""
    active_layer_parameters: int
    """Of one layer, the parameters that one token uses."""
    num_experts: int = 0
    """Of one layer; 0: it has no experts."""
    expert_intermediate: int = 0
    """Width of one expert."""
    experts_per_token: int = 0
    """Of those of a layer; 0: it has no experts."""
    embedding_parameters: int
    """Of the token embeddings, and of position embeddings if they are learned."""
    head_parameters: int
    """Of the output layer; 0 if it is tied to the token embeddings."""
    norm_parameters: int
    """Of the last norm."""
    is_scalar: bool = False
    """The output is one number, not a distribution over the vocabulary."""

    @property
    def num_parameters(self) -> int:
        layers = self.num_layers * self.layer_parameters
        return layers + self.embedding_parameters + self.head_parameters + self.norm_parameters

    @property
    def num_active_parameters(self) -> int:
        """Those that one token uses: of the experts of each layer, the chosen ones."""
        return self.num_parameters - self.num_layers * (self.layer_parameters - self.active_layer_parameters)

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers in the KV cache for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def flops_per_token(self, context: float) -> float:
        """Of one forward pass, for a token with `context` tokens before it: two for each weight that it uses, and those
        of attention (Kaplan et al. 2020, table 1)."""
        head = self.hidden * (1 if self.is_scalar else self.vocab)
        weights = self.num_layers * self.active_layer_parameters + head
        return 2.0 * weights + 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    def adapter_parameters(self, rank: int, *, on_experts: bool = False) -> int:
        """Of LoRA adapters on every linear layer, and `on_experts` on both tensors of the experts of each layer."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sides = 2 * (self.hidden + query) + 2 * (self.hidden + kv)
        sides += self._feed_forward_matrices * (self.hidden + self.intermediate)
        if on_experts:
            sides += self.num_experts * (2 * self.hidden + 3 * self.expert_intermediate)
        return self.num_layers * rank * sides

    @property
    def expert_parameters(self) -> int:
        """Of all experts of one layer, each with three matrices."""
        return self.num_experts * 3 * self.hidden * self.expert_intermediate

    @property
    def linear_parameters(self) -> int:
        """Of all linear layers except the output layer and experts."""
        feed_forward = self._feed_forward_matrices * self.hidden * self.intermediate
        return self.num_layers * (self._attention_parameters + feed_forward)

    @property
    def _attention_parameters(self) -> int:
        """Of one layer."""
        return _attention(self.hidden, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim)

    @property
    def _feed_forward_matrices(self) -> int:
        """Of one layer."""
        if self.layer_parameters != self.active_layer_parameters:
            return 0
        return (self.layer_parameters - self._attention_parameters) // (self.hidden * self.intermediate)

    def as_scorer(self) -> "ModelShape":
        """The same backbone with one output, as in reward models and critics."""
        return replace(self, head_parameters=self.hidden, is_scalar=True)


class _Sizes:
    """Reads whole numbers from a config.json under any of their names."""

    def __init__(self, where: str, config: Mapping[str, object]) -> None:
        self._where = where
        self._config = config

    def __call__(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self._config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise ModelError(f"{self._where}: config.json has no {keys[0]}, so the model's size is unknown.")
        return default


def model_shape(where: str, config: Mapping[str, object]) -> ModelShape:
    """The sizes that a Hugging Face config.json gives. A model type that is not in `FAMILIES` counts as Llama's.

    Raises:
        ModelError: a size is missing. It begins with `where`.
    """
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    family = FAMILIES.get(str(inner.get("model_type")), LLAMA)
    size = _Sizes(where, inner)
    hidden, vocab = size("hidden_size", "n_embd"), size("vocab_size")
    num_heads = size("num_attention_heads", "n_head")
    head_dim = size("head_dim", default=hidden // num_heads)
    num_kv_heads = size("num_key_value_heads", default=num_heads)
    biased = family.qkv_bias or family.all_bias or inner.get("attention_bias") is True
    around = _attention(hidden, num_heads * head_dim, num_kv_heads * head_dim)
    around += (num_heads + 2 * num_kv_heads) * head_dim * biased + hidden * (biased and not family.qkv_bias)
    around += 2 * head_dim * family.head_norms + family.num_norms * hidden * (2 if family.all_bias else 1)
    width, every, active = _feed_forward(size, hidden, family)
    num_experts = _num_experts(size)
    tied = inner.get("tie_word_embeddings", family.tied) is True
    positions = size("max_position_embeddings", "n_positions") if family.learnt_positions else 0
    return ModelShape(
        num_layers=size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate=width,
        vocab=vocab,
        layer_parameters=around + every,
        active_layer_parameters=around + active,
        num_experts=num_experts if num_experts > 1 else 0,
        expert_intermediate=_expert_width(size) if num_experts > 1 else 0,
        experts_per_token=size("num_experts_per_tok", default=2) if num_experts > 1 else 0,
        embedding_parameters=(vocab + positions) * hidden,
        head_parameters=0 if tied else vocab * hidden,
        norm_parameters=hidden * (2 if family.all_bias else 1),
    )


def _attention(hidden: int, query: int, kv: int) -> int:
    """Weights of the four projections."""
    return 2 * hidden * query + 2 * hidden * kv


def _feed_forward(size: _Sizes, hidden: int, family: Family) -> tuple[int, int, int]:
    """Width that a token uses, weights in all, and weights that a token uses."""
    width = size("intermediate_size", "n_inner", default=4 * hidden)
    num_matrices = 3 if family.gated else 2
    num_experts = _num_experts(size)
    if num_experts == 1:
        weights = num_matrices * hidden * width + (width + hidden) * family.all_bias
        return width, weights, weights
    one = _expert_width(size)
    chosen = size("num_experts_per_tok", default=2)
    shared = size("shared_expert_intermediate_size", default=0)
    router = hidden * num_experts + hidden * (shared > 0)
    expert, always = num_matrices * hidden * one, num_matrices * hidden * shared + router
    return chosen * one + shared, num_experts * expert + always, chosen * expert + always


def _num_experts(size: _Sizes) -> int:
    return size("num_local_experts", "num_experts", default=1)


def _expert_width(size: _Sizes) -> int:
    return size("moe_intermediate_size", "intermediate_size")
