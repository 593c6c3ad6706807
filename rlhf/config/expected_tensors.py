"""Which tensors a checkpoint of a common dense decoder has, by its config.json.

A check reads this in place of transformers, which takes seconds to import. Model types that are not listed are compared
with transformers' own model when a run starts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf.config.json_file import ModelFileError
from rlhf.config.weight_files import Shapes

HEADS = ("lm_head.", "score.")
"""Output layers, which a run may replace."""
BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Ends of names in older checkpoints that transformers leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the layers of a model type differ from Llama's."""

    biased: tuple[str, ...] = ()
    """Projections that always have a bias."""
    has_head_norms: bool = False
    """Queries and keys are normalized by head."""
    bias_setting: str | None = "attention_bias"
    """The setting of config.json that gives all four projections of attention a bias."""
    mlp_bias_setting: str | None = None
    default_head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias_setting="mlp_bias"),
    "mistral": Family(bias_setting=None),
    "qwen2": Family(biased=("q_proj", "k_proj", "v_proj"), bias_setting=None),
    "qwen3": Family(has_head_norms=True, default_head_dim=128),
}
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of each of these families."""


def linear_layers(config: Mapping[str, object]) -> tuple[str, ...] | None:
    """Names of the linear layers in a model's backbone; None if its type is not listed."""
    return LINEAR_LAYERS if config.get("model_type") in FAMILIES else None


def require_expected_tensors(config: Mapping[str, object], found: Shapes) -> None:
    """Compare the tensors of a checkpoint with those that its config.json means, if it is of a listed type and says all
    its sizes.

    Raises:
        ModelFileError: tensors are missing, have another shape, or fit nothing.
    """
    expected = expected_tensors(config)
    if expected is None or not any(name.startswith("model.layers.") for name in found):
        return  # a checkpoint of the backbone alone has other names
    wrong = [name for name, shape in expected.items() if name in found and found[name] != shape]
    if wrong:
        name = wrong[0]
        raise ModelFileError(f"{name}: shape {list(found[name])}, config.json gives {list(expected[name])}.")
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelFileError(f"{len(missing)} weights are missing (first: {missing[0]}).")
    surplus = [
        name for name in found if name not in expected and not name.startswith(HEADS) and not name.endswith(BUFFERS)
    ]
    if surplus:
        raise ModelFileError(f"{len(surplus)} weights fit nothing in config.json (first: {surplus[0]}).")


def expected_tensors(config: Mapping[str, object]) -> Shapes | None:
    """Names and shapes of a checkpoint's tensors; None if the model's type is not listed, or a size is missing."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or "quantization_config" in config:
        return None
    sizes = {
        name: _whole(config.get(name))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    if None in sizes.values():
        return None
    vocab, hidden, width, num_layers, heads = (size or 0 for size in sizes.values())
    kv_heads = _whole(config.get("num_key_value_heads")) or heads
    head_dim = _whole(config.get("head_dim")) or family.default_head_dim or hidden // heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    layer = dict(_layer(config, family, hidden, width, heads * head_dim, kv_heads * head_dim, head_dim))
    for index in range(num_layers):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    classes = config.get("architectures")
    is_language_model = isinstance(classes, list) and str(classes[:1]).endswith("ForCausalLM']")
    if is_language_model and config.get("tie_word_embeddings") is False:
        tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def _layer(
    config: Mapping[str, object], family: Family, hidden: int, width: int, query: int, kv: int, head_dim: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in a layer, and their shapes."""
    attention = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, query)}
    mlp = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    all_biased = family.bias_setting is not None and config.get(family.bias_setting) is True
    mlp_biased = family.mlp_bias_setting is not None and config.get(family.mlp_bias_setting) is True
    for part, layers, is_biased in (("self_attn", attention, all_biased), ("mlp", mlp, mlp_biased)):
        for name, shape in layers.items():
            yield f"{part}.{name}.weight", shape
            if is_biased or name in family.biased:
                yield f"{part}.{name}.bias", shape[:1]
    if family.has_head_norms:
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
