"""What a model's files say about it, read without a library that could run the model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.config.expected_tensors import linear_layers, require_expected_tensors
from rlhf.config.json_file import ModelFileError, read_json
from rlhf.config.tokenizer_files import require_rows
from rlhf.config.weight_files import has_weights, tensor_shapes

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CLASSIFIER = "ForSequenceClassification"
HEAD_LAYERS = re.compile(
    r"(classifier|pre_classifier|classification_head|head|pooler|logits_proj|sequence_summary|v_head|value_head|"
    r"reward_head|regression_head)\."
)
"""Layers of heads other than `score`, at the top of a model."""

POSITIONS_BEHIND_PAD = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"})
MOST_LAYERS = 1000
"""No model has more layers that share their weights."""
TWO_STACKS = frozenset({"t5", "mt5", "umt5", "bart", "mbart", "led", "plbart", "mvp"})
SCORE_CAPS = frozenset({"attn_logit_softcapping", "attention_logit_cap", "attn_logit_soft_cap"})
"""What families call a cap on attention scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What config.json and the tokenizer's files say. None: they do not say it."""

    folder: Path
    model_type: str
    vocab_size: int | None
    context: int | None
    num_labels: int | None
    """Outputs of the head of a classifier; None for a language model."""
    has_chat_template: bool
    has_own_code: bool
    """The model comes with Python code that would have to be run."""
    quantization: str | None = None
    """How the weights in the files are quantized."""
    architecture: str | None = None
    """Name of the model's class, the first one that config.json lists."""
    num_layers: int | None = None
    num_experts: int | None = None
    """Experts of a layer among which a router chooses."""
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    """Dimensions of a head, where all heads have the same number."""
    latent_size: int | None = None
    """Dimensions of a token's keys and values where these are kept compressed (DeepSeek)."""
    has_sparse_attention: bool = False
    """Each token attends to those that an indexer chooses (DeepSeek-V3.2)."""
    has_gated_delta: bool = False
    """Some layers hold a state that a gated delta rule changes (Qwen3-Next, Qwen3.5)."""
    gated_delta_sizes: frozenset[int] = frozenset()
    """Dimensions that the heads of keys and values have in such layers."""
    width: int | None = None
    """Intermediate dimensions of a feed-forward layer, or of an expert."""
    caps_scores: bool = False
    """Attention scores are capped (Gemma 2)."""
    linear_layers: tuple[str, ...] | None = None
    """Names of the layers that can have adapters, without the path to them."""
    other_head: str | None = None
    """What a sequence classifier has in place of a score at the last token: `a BertForSequenceClassification has
    classifier`. It can score, but neither be trained nor be a critic."""
    has_decoder_behind_encoder: bool = False


def local_folder(model: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of a model on this machine; None for a hub model that is not downloaded, or only in part.

    Raises:
        ModelFileError: there is no such folder, and the name is not that of a hub model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelFileError(f"{model} is a file, need a model's folder.")
    parent = folder.parent
    looks_local = parent != Path() and parent.is_dir()
    if not HUB_NAME.fullmatch(model) or looks_local:
        raise ModelFileError(f"no such folder: {model}.")
    cached = _cached(model, environ)
    if cached is not None and has_weights(cached):
        return cached
    if environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise ModelFileError(f"{model} is not in the hub's cache, and HF_HUB_OFFLINE is set.")
    return None


def described_folder(model: str, environ: Mapping[str, str]) -> Path | None:
    """Like `local_folder`, but for a hub model config.json is enough: `rlhf plan` downloads no more."""
    cached = None if Path(model).expanduser().exists() else _cached(model, environ)
    return cached or local_folder(model, environ)


def trusted_commit(trust_remote_code: str | None, model: str) -> str | None:
    """The commit of repo@commit, if repo is this model."""
    repo, _, commit = (trust_remote_code or "").partition("@")
    return commit if commit and repo == model else None


def untrusted(model: str) -> str:
    """The message about a model whose own code was not allowed."""
    return f"needs remote code; review it, then set trust_remote_code to {model}@<commit>."


def quantized(model: str, method: str) -> str:
    """The message about a model whose weights are quantized in its files."""
    return (
        f"{model} has quantized weights ({method}), which cannot be loaded here. Name the model that it was made from; "
        "quantization=nf4 holds that in 4 bits."
    )


def _cached(model: str, environ: Mapping[str, str]) -> Path | None:
    """The newest snapshot of a hub model in huggingface_hub's cache, which may be incomplete."""
    home = Path(environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{model.replace('/', '--')}"
    try:
        snapshot = hub / "snapshots" / (hub / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if (snapshot / "config.json").is_file() else None


def read_model(folder: Path) -> ModelFacts:
    """Read config.json, the tokenizer's presence and every safetensors header.

    Raises:
        ModelFileError: a file is missing or damaged.
    """
    facts = describe_model(folder)
    config, shapes = read_config_json(folder), tensor_shapes(folder)
    for name, shape in shapes.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and facts.vocab_size not in (None, *shape[:1]):
            expected = f"config.json has a vocabulary of {facts.vocab_size}"
            raise ModelFileError(f"{name}: shape {list(shape)}, {expected}.")
    _require_layers(folder / "config.json", config, len(shapes))
    require_expected_tensors(config, shapes)
    require_rows(folder, shapes)
    return replace(facts, other_head=other_head(config, shapes))


def describe_model(folder: Path) -> ModelFacts:
    """What the small files of a model say. Raises ModelFileError."""
    _require_no_adapter(folder)
    config = read_config_json(folder)
    _require_token_ids(folder / "config.json", config)
    if (generation := folder / "generation_config.json").is_file():
        _require_token_ids(generation, read_json(generation))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelFileError(f'{folder / "config.json"}: no "model_type".')
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    _require_names(folder / "config.json", config)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if inner.get(key) is not None and _whole(inner[key]) is None:
            raise ModelFileError(f"{folder / 'config.json'}: {key} is {str(inner[key])[:40]!r}, need a whole number.")
    return ModelFacts(
        folder=folder,
        model_type=model_type,
        vocab_size=_whole(inner.get("vocab_size")),
        context=_context(inner),
        num_labels=_num_labels(config),
        has_chat_template=_has_chat_template(folder),
        has_own_code="auto_map" in config,
        quantization=_quantization(config),
        architecture=_architecture(config),
        num_layers=_whole(inner.get("num_hidden_layers")),
        num_experts=next((found for key in EXPERT_KEYS if (found := _whole(inner.get(key)))), None),
        num_heads=_whole(inner.get("num_attention_heads")),
        num_kv_heads=_whole(inner.get("num_key_value_heads")),
        head_dim=_head_dim(inner),
        latent_size=_latent_size(inner),
        has_sparse_attention="index_topk" in inner,
        has_gated_delta="linear_num_value_heads" in inner,
        gated_delta_sizes=_gated_delta_sizes(inner),
        width=_whole(inner.get("moe_intermediate_size")) or _whole(inner.get("intermediate_size")),
        caps_scores=caps_scores(config),
        linear_layers=linear_layers(config),
        has_decoder_behind_encoder=config.get("is_encoder_decoder") is True or model_type in TWO_STACKS,
    )


def caps_scores(config: Mapping[str, object]) -> bool:
    """Whether a config, or one inside it, says that attention scores are capped."""
    return any(
        caps_scores(value) if isinstance(value, Mapping) else bool(value and name in SCORE_CAPS)
        for name, value in config.items()
    )


def _require_no_adapter(folder: Path) -> None:
    """Raises ModelFileError for a folder that peft wrote."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    base = read_json(file).get("base_model_name_or_path")
    raise ModelFileError(
        f"{folder} holds a LoRA adapter of {base or 'some model'} ({file.name}), which transformers would add to that. "
        f'Merge it: peft.AutoPeftModelForCausalLM.from_pretrained("{folder}").merge_and_unload().save_pretrained('
        '"merged"), add the tokenizer\'s files, and name the folder "merged"; or remove the adapter\'s files.'
    )


def _require_names(file: Path, config: Mapping[str, object]) -> None:
    """Raises ModelFileError unless `architectures` is a list of names, or not there."""
    found = config.get("architectures")
    if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise ModelFileError(f"{file}: architectures is {str(found)[:40]!r}, need a list of names.")


def _require_layers(file: Path, config: Mapping[str, object], num_tensors: int) -> None:
    """Raises ModelFileError for more layers than the files can hold: building these would not end."""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    num_layers = _whole(inner.get("num_hidden_layers"))
    if num_layers is not None and num_layers > max(MOST_LAYERS, num_tensors):
        raise ModelFileError(f"{file}: num_hidden_layers is {num_layers}, and the files hold {num_tensors} weights.")


def _require_token_ids(file: Path, content: Mapping[str, object]) -> None:
    """Raises ModelFileError unless the ids of special tokens are numbers."""
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = content.get(key)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token_id) is int for token_id in ids):
            raise ModelFileError(f"{file}: {key} is {str(value)[:40]!r}, need a token id or a list of token ids.")


def _quantization(config: Mapping[str, object]) -> str | None:
    found = config.get("quantization_config")
    return None if found is None else str(found.get("quant_method") if isinstance(found, dict) else found)[:40]


def other_head(config: Mapping[str, object], tensors: Iterable[str]) -> str | None:
    """What a sequence classifier has in place of a score at the last token, by its class and the names of its tensors;
    None if it has one, or is no sequence classifier.

    Classifiers of decoders have one layer, `score`, at the last token. Those of encoders pool all tokens, or the first,
    by layers of other names.
    """
    classes = config.get("architectures")
    listed = [str(name) for name in classes] if isinstance(classes, list) else []
    found = next((name for name in listed if name.endswith(CLASSIFIER)), None)
    names = list(tensors)
    if found is None or not names or any(name.endswith("score.weight") for name in names):
        return None
    heads = sorted({name.partition(".")[0] for name in names if HEAD_LAYERS.match(name)})
    if not heads:
        return None  # the head is missing, which is reported when the model is loaded
    return f"a {found} has no score at the last token (it has {', '.join(heads)})"


def only_scores(other: str) -> str:
    """The message about a model with another head that would have to be trained."""
    return f"{other}; it can be the reward model of an online run, but neither be trained nor be a critic or a PRM."


def two_stacks(other: str) -> str:
    """The message about a classifier that reads with an encoder and a decoder."""
    return f"{other}, and reads with an encoder and a decoder; serve it over HTTP (reward.url)."


def read_config_json(folder: Path) -> dict[str, object]:
    """A model's config.json. Raises ModelFileError."""
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        raise ModelFileError(f"{folder} is the folder of a run. Name its model: {folder / 'model'}.")
    return read_json(folder / "config.json")


def _architecture(config: Mapping[str, object]) -> str | None:
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else None


def _context(config: Mapping[str, object]) -> int | None:
    """The longest sequence. Families that number positions from behind the pad token have that many fewer."""
    size = next((size for key in CONTEXT_KEYS if (size := _whole(config.get(key)))), None)
    if size is None or config.get("model_type") not in POSITIONS_BEHIND_PAD:
        return size
    pad = config.get("pad_token_id")
    return size - 1 - (pad if isinstance(pad, int) else 1)


def _head_dim(config: Mapping[str, object]) -> int | None:
    if any(key in config for key in ("kv_lora_rank", "global_head_dim")):
        return None  # heads of several sizes
    hidden, heads = _whole(config.get("hidden_size")), _whole(config.get("num_attention_heads"))
    return _whole(config.get("head_dim")) or (hidden // heads if hidden and heads else None)


def _latent_size(config: Mapping[str, object]) -> int | None:
    sizes = [_whole(config.get(key)) for key in ("kv_lora_rank", "qk_rope_head_dim")]
    return sum(size for size in sizes if size) if all(sizes) else None


def _gated_delta_sizes(config: Mapping[str, object]) -> frozenset[int]:
    sizes = [_whole(config.get(key)) for key in ("linear_key_head_dim", "linear_value_head_dim")]
    return frozenset(size for size in sizes if size)


def _num_labels(config: Mapping[str, object]) -> int | None:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not any(str(name).endswith(("ForSequenceClassification", "ForTokenClassification")) for name in names):
        return None
    labels = config.get("id2label")
    return _whole(config.get("num_labels")) or (len(labels) if isinstance(labels, dict) else 2)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
