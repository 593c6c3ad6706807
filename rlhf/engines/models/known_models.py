"""Models of which their small files alone show that transformers loads them, without importing it.

Only what is certain counts: a folder with a dense decoder of a common type, whose settings are all known, and whose
tensors are exactly those that its config.json means. Of anything else nothing is said here; transformers then is asked.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import safe_open

from rlhf.config.expected_tensors import expected_tensors
from rlhf.config.json_file import ModelFileError, read_json
from rlhf.types import Head

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LANGUAGE_MODEL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
STORED_DTYPES = ("F32", "BF16", "F16")
FILES_OF_WEIGHTS = "*.safetensors"


def _fraction(value: object) -> object:
    """transformers takes no whole number for these settings, and pydantic does."""
    if not isinstance(value, float):
        raise ValueError("need a number with a point")
    return value


def _off(value: object) -> object:
    """As above: 0 is not false."""
    if value is not False:
        raise ValueError("need false")
    return value


Fraction = Annotated[float, BeforeValidator(_fraction), Field(gt=0.0)]
Off = Annotated[bool, BeforeValidator(_off)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
TokenId = Annotated[int, Field(ge=0)]


class Known(BaseModel):
    """Settings that are all known, each with values that are known to be fine."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class PlainRope(Known):
    """Rotary embeddings as they were published."""

    rope_type: Literal["default"]
    rope_theta: Positive | None = None


class Llama3Rope(Known):
    """The scaling of Llama 3.1."""

    rope_type: Literal["llama3"]
    rope_theta: Positive | None = None
    factor: Annotated[float, Field(ge=1.0)]
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: PositiveInt


Rope = Annotated[PlainRope | Llama3Rope, Field(discriminator="rope_type")]


class KnownConfig(Known):
    """A config.json."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    architectures: list[str]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)] | None = None
    hidden_act: Literal["silu"] = "silu"
    initializer_range: Annotated[Fraction, Field(le=1.0)] = 0.02
    rms_norm_eps: Fraction = 1e-6
    attention_dropout: Share = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    pretraining_tp: Annotated[int, Field(ge=1, le=1)] = 1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    rope_theta: Positive = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    use_sliding_window: Off = False
    sliding_window: PositiveInt | None = None
    max_window_layers: PositiveInt = 1
    layer_types: list[Literal["full_attention"]] | None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: Literal["regression"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    transformers_version: str | None = None

    @property
    def is_classifier(self) -> bool:
        """Whether it scores, and does not write."""
        return self.architectures == [CLASSES[self.model_type] + CLASSIFIER]

    @property
    def fits(self) -> bool:
        """Whether the settings fit each other, and the model's type."""
        kind, heads = self.model_type, self.num_attention_heads
        is_qwen = kind in ("qwen2", "qwen3")
        is_null = "head_dim" in self.model_fields_set and self.head_dim is None
        return (
            self.hidden_size % (2 * heads) == 0
            and (heads % self.num_key_value_heads == 0 if self.num_key_value_heads else kind == "llama")
            and not (is_null and is_qwen)
            and (self.rope_scaling is None or self.rope_parameters is None)
            and (self.layer_types is None or (is_qwen and len(self.layer_types) == self.num_hidden_layers))
            and (self.pad_token_id is None or self.pad_token_id < self.vocab_size)
            and (self.sliding_window is None or kind != "llama")
            and (self.is_classifier or self.architectures == [CLASSES[kind] + LANGUAGE_MODEL])
            and set(self.id2label or ()) == ({"0"} if self.is_classifier or self.id2label is not None else set())
        )


class KnownGeneration(Known):
    """A generation_config.json."""

    from_model_config: Annotated[bool, Field(alias="_from_model_config")] = False
    do_sample: bool = False
    use_cache: bool = True
    output_attentions: Off = False
    output_hidden_states: Off = False
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    temperature: Fraction | None = None
    top_p: Annotated[Fraction, Field(le=1.0)] | None = None
    top_k: PositiveInt | None = None
    repetition_penalty: Fraction | None = None
    max_length: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None
    transformers_version: str | None = None


def known_config(folder: Path) -> KnownConfig | None:
    """The config.json of a folder whose every setting is known to be fine; None if that cannot be said."""
    try:
        config = KnownConfig.model_validate(read_json(folder / "config.json"))
    except (ModelFileError, ValidationError):
        return None
    return config if config.fits else None


def loads(folder: Path, head: Head, *, is_new: bool) -> bool:
    """Whether transformers is known to load the model in a folder with this head, which is a new one where `is_new`
    and the files have none. False: it is not known."""
    config = known_config(folder)
    if config is None or head is Head.TOKEN_SCORES or not _has_known_generation(folder):
        return False
    found, backbone = _stored_shapes(folder), expected_tensors(config.model_dump(exclude_none=True))
    if found is None or backbone is None:
        return False
    expected = {name: shape for name, shape in backbone.items() if not name.startswith("lm_head.")}
    if config.is_classifier:
        return head is not Head.LOG_PROBS and found == {**expected, "score.weight": (1, config.hidden_size)}
    output = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    return found == {**expected, **output} and (head is Head.LOG_PROBS or is_new)


def _has_known_generation(folder: Path) -> bool:
    file = folder / "generation_config.json"
    if not file.exists():
        return True
    try:
        KnownGeneration.model_validate(read_json(file))
    except (ModelFileError, ValidationError):
        return False
    return True


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of every tensor in a folder whose safetensors files are the one that transformers reads, or those
    of the index that it reads; None if that is not sure, or they cannot be read."""
    paths = sorted(folder.glob(FILES_OF_WEIGHTS))
    if [path.name for path in paths] != ["model.safetensors"] and not _are_of_the_index(folder, paths):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("format") != "pt":
                    return None
                for name in file.keys():  # noqa: SIM118  no mapping
                    tensor = file.get_slice(name)
                    if name in shapes or tensor.get_dtype() not in STORED_DTYPES:
                        return None
                    shapes[name] = tuple(tensor.get_shape())
        except Exception:  # whatever is wrong with it is said when transformers reads it
            return None
    return shapes


def _are_of_the_index(folder: Path, paths: list[Path]) -> bool:
    try:
        index = read_json(folder / "model.safetensors.index.json")
    except ModelFileError:
        return False
    places = index.get("weight_map")
    return (
        isinstance(index.get("metadata"), dict)
        and isinstance(places, dict)
        and "model.safetensors" not in {path.name for path in paths}
        and set(places.values()) == {path.name for path in paths}
    )
