"""Loads a Hugging Face model for one of the heads, and rejects an unusable one with all reasons at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import (
    describe_model,
    only_scores,
    other_head,
    quantized,
    read_model,
    trusted_commit,
    two_stacks,
    untrusted,
)
from rlhf.config.models import ModelSection, dtype_on
from rlhf.engines.models.attention import choose_attention
from rlhf.engines.models.finite_weights import is_finite
from rlhf.engines.models.hub import HUB_TIMEOUT_S
from rlhf.engines.models.noise import remove_noise
from rlhf.engines.models.text_part import language_model_class
from rlhf.engines.process.library_output import silence_libraries
from rlhf.errors import ModelError, RlhfError
from rlhf.types import Head

WEIGHTS = "*.safetensors"
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
)
"""What an export takes over from the model's folder as it is: the tokenizer, sampling settings, and custom code."""
SCORERS = {
    Head.VALUES: AutoModelForSequenceClassification,
    Head.SCORES: AutoModelForSequenceClassification,
    Head.TOKEN_SCORES: AutoModelForTokenClassification,
}
"""The transformers class that loads and saves a model with each scalar head."""
HEAD_WEIGHTS = ("lm_head.", "score.")


class LoadingInfo(TypedDict):
    """What transformers reports after loading."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model, its folder, and the dropout rates that were set to 0: two passes must give the same log-probs. On CPU if
    it comes from `load_model`, on the meta device if it comes from `build_meta_model`."""

    model: PreTrainedModel
    folder: Path
    dropouts: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inspected:
    """What is known about a model before its weights are read."""

    folder: Path
    config: PretrainedConfig
    trusted: str | None
    has_score: bool
    dropouts: dict[str, float]
    is_pooled: bool = False
    """The classifier has another head than a score at the last token."""


def load_model(
    section: ModelSection, name: str, head: Head, *, where: str, device: torch.device, seed: int, new_head: bool
) -> LoadedModel:
    """Load `name`, a folder or hub name, for `head`, into host memory; `where` (policy.model, ...) begins each line of
    an error, `device` is where the model will compute.

    Log-probs need a causal language model. Values and scores need a sequence classifier, token scores a token
    classifier, with one label and a `score` head; with `new_head` any other model too, which gets a new head from
    `seed`.

    Raises ModelError with one line for each problem.
    """
    inspected = _inspect(section, name, head, where, new_head)
    dtype = choose_dtype(section, device, where)
    attention = _attention(section, head, inspected.config, device, dtype)
    model, problems = _read(inspected, head, where, dtype, attention, device_map=None)
    problems += _bad_numbers(model)
    if problems:
        raise ModelError([f"{where}: {problem}" for problem in problems])
    if head is not Head.LOG_PROBS and not inspected.has_score:
        _initialize_score(model, seed)
    return LoadedModel(model=model, folder=inspected.folder, dropouts=inspected.dropouts)


def inspect_model(section: ModelSection, name: str, head: Head, *, where: str, new_head: bool) -> PreTrainedModel:
    """The model that `load_model` would load, on torch's meta device: only the headers of the weights are read.

    Raises ModelError as `load_model`, except for numbers that are not finite.
    """
    inspected = _inspect(section, name, head, where, new_head)
    try:
        read_model(inspected.folder)
    except ModelFileError as error:
        raise ModelError(f"{where}: {error}") from error
    model, problems = _read(inspected, head, where, torch.float32, "eager", device_map="meta")
    if problems:
        raise ModelError([f"{where}: {problem}" for problem in problems])
    return model


def _read(
    inspected: _Inspected, head: Head, where: str, dtype: torch.dtype, attention: str, *, device_map: str | None
) -> tuple[PreTrainedModel, list[str]]:
    """A model as transformers reads it, and which of its weights are missing, unexpected, or of another shape. Raises
    ModelError if it does not load."""
    with unreadable(f"{where}: {inspected.folder.name} does not load"):
        loaded = _auto_class(head, inspected.config).from_pretrained(
            inspected.folder,
            config=inspected.config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=inspected.trusted is not None,
            device_map=device_map,
        )
    model, info = cast(tuple[PreTrainedModel, LoadingInfo], loaded)
    if head is not Head.LOG_PROBS and not inspected.is_pooled and "score" not in dict(model.named_children()):
        raise ModelError(
            f"{where}: a {type(model).__name__} has no score layer; only decoder models can have one here."
        )
    return model, _loading_problems(info, inspected.has_score)


def build_meta_model(
    section: ModelSection, name: str, head: Head, *, where: str, device: torch.device, new_head: bool
) -> LoadedModel:
    """The model that `load_model` would load, on torch's meta device: no weights are read. Raises ModelError."""
    inspected = _inspect(section, name, head, where, new_head)
    dtype = choose_dtype(section, device, where)
    with torch.device("meta"):
        model = _auto_class(head, inspected.config).from_config(
            inspected.config,
            dtype=dtype,
            attn_implementation=_attention(section, head, inspected.config, device, dtype),
            trust_remote_code=inspected.trusted is not None,
        )
    return LoadedModel(model=cast(PreTrainedModel, model), folder=inspected.folder, dropouts=inspected.dropouts)


def _inspect(section: ModelSection, name: str, head: Head, where: str, new_head: bool) -> _Inspected:
    """Read a model's folder and config, and adapt the config to `head`. Raises ModelError."""
    silence_libraries()  # transformers' load report warns about heads, which are checked here
    trusted = trusted_commit(section.trust_remote_code, name)
    folder = resolve_folder(name, where=where, revision=trusted)
    config = _load_config(name, folder, trusted, where)
    ending = _auto_class(head, config).__name__.removeprefix("AutoModel")
    has_score = head is not Head.LOG_PROBS and any(name.endswith(ending) for name in config.architectures or ())
    is_pooled = False
    if head is not Head.LOG_PROBS:
        is_pooled = _is_pooled(config, folder, where, can_be=head is Head.SCORES and not new_head)
        _require_scorer(config, has_score, new_head, where, "token" if head is Head.TOKEN_SCORES else "sequence")
        config.num_labels = 1
    dropouts = remove_noise(config)
    return _Inspected(
        folder=folder, config=config, trusted=trusted, has_score=has_score, dropouts=dropouts, is_pooled=is_pooled
    )


def _auto_class(head: Head, config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """The transformers class that loads and saves a model with this head."""
    return SCORERS[head] if head in SCORERS else language_model_class(config)


def resolve_folder(name: str, *, where: str, revision: str | None = None) -> Path:
    """The local folder of a model; a hub name is downloaded first. Raises ModelError."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(name, revision, where, (WEIGHTS, *SMALL_FILES))
    _require_config(folder, name, where)
    if not any(folder.glob(WEIGHTS)):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise ModelError(f"{where}: only pickle weights ({pickles[0]}); convert them to safetensors.")
        raise ModelError(f"{where}: {name} has no safetensors weights.")
    for path in sorted(folder.glob(WEIGHTS)):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(f"{where}: {path.name}: damaged safetensors header ({error}).") from error
        except OSError as error:
            raise ModelError(f"{where}: {path.name} cannot be read ({error.strerror or error}).") from error
    return folder


def require_supported_model(section: ModelSection, name: str, *, where: str) -> Path:
    """The folder of a model's small files; those of a hub name are downloaded first. No weights are read.

    Raises:
        ModelError: there is no such model, transformers does not support its type, or it needs remote code.
    """
    trusted = trusted_commit(section.trust_remote_code, name)
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(name, trusted, where, SMALL_FILES)
    _require_config(folder, name, where)
    _load_config(name, folder, trusted, where)
    return folder


def _require_config(folder: Path, name: str, where: str) -> None:
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(f"{where}: {name} has no config.json; it is not a Hugging Face model.")


def _download(name: str, revision: str | None, where: str, files: Sequence[str]) -> Path:
    try:
        patterns = list(files)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
    except GatedRepoError as error:
        raise ModelError(f"{where}: {name} is gated; log in with `hf auth login`.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{where}: no folder and no hub model of this name (got {name}).") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{where}: no folder {name}, not in the hub's cache ({HF_HUB_CACHE}), and the hub ({ENDPOINT}) cannot be "
            f"reached ({_network_error(error)})."
        ) from error


def choose_dtype(section: ModelSection, device: torch.device, where: str) -> torch.dtype:
    """The dtype of the weights; auto is float32 on CPU and bfloat16 on GPUs. Raises ModelError for a GPU without
    bfloat16."""
    if dtype_on(section.dtype, device.type) == "float32":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(
            f"{where}: dtype bfloat16 is not supported by {torch.cuda.get_device_name(device)}. Set dtype float32."
        )
    return torch.bfloat16


def _load_config(name: str, folder: Path, trusted: str | None, where: str) -> PretrainedConfig:
    try:
        facts = describe_model(folder)
    except ModelFileError as error:
        raise ModelError(f"{where}: {error}") from error
    if facts.has_own_code and trusted is None:
        raise ModelError(f"{where}: {untrusted(name)}")
    if facts.quantization is not None:
        raise ModelError(f"{where}: {quantized(name, facts.quantization)}")
    if not facts.has_own_code and facts.model_type not in CONFIG_MAPPING:
        raise ModelError(f'{where}: config.json has model_type "{facts.model_type}", which is not supported.')
    with unreadable(f"{where}: config.json cannot be used"):
        return cast(PretrainedConfig, AutoConfig.from_pretrained(folder, trust_remote_code=trusted is not None))


def _attention(
    section: ModelSection, head: Head, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> str:
    kinds = cast(Mapping[type[PretrainedConfig], type[PreTrainedModel]], _auto_class(head, config)._model_mapping)
    model_class = kinds.get(type(config), None)
    return choose_attention(section.attention, config, device, dtype, model_class)


def _require_scorer(config: PretrainedConfig, has_score: bool, new_head: bool, where: str, unit: str) -> None:
    if has_score and config.num_labels != 1:
        raise ModelError(f"{where}: has {config.num_labels} labels, need 1.")
    if not has_score and not new_head:
        kinds = ", ".join(config.architectures or ()) or "no architecture"
        raise ModelError(f"{where}: has no score head ({kinds}), need a {unit} classifier with 1 label.")


def _is_pooled(config: PretrainedConfig, folder: Path, where: str, *, can_be: bool) -> bool:
    """Whether a classifier has another head than a score at the last token. Raises ModelError where it cannot be."""
    names: list[str] = []
    for path in sorted(folder.glob(WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    other = other_head({"architectures": config.architectures}, names)
    if other is not None and describe_model(folder).has_decoder_behind_encoder:
        raise ModelError(f"{where}: {two_stacks(other)}")
    if other is not None and not can_be:
        raise ModelError(f"{where}: {only_scores(other)}")
    return other is not None


def _loading_problems(info: LoadingInfo, has_score: bool) -> list[str]:
    """Weights that are missing from the checkpoint, unexpected, or of another shape."""
    problems = [
        f"{name}: shape {list(found)}, config.json gives {list(expected)}."
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    missing = sorted(name for name in info["missing_keys"] if has_score or not name.startswith("score."))
    if missing:
        problems.append(f"{len(missing)} weights are missing (first: {missing[0]}).")
    surplus = sorted(name for name in info["unexpected_keys"] if not name.startswith(HEAD_WEIGHTS))
    if surplus:
        problems.append(f"{len(surplus)} weights fit nothing in config.json (first: {surplus[0]}).")
    return problems


def _bad_numbers(model: PreTrainedModel) -> list[str]:
    problems = []
    for name, parameter in model.named_parameters():
        if is_finite(parameter):  # minimum and maximum: a fortieth of the time that counting takes
            continue
        num_nan = int(parameter.isnan().sum())
        num_inf = int(parameter.isinf().sum())
        if num_nan:
            problems.append(f"{name} holds {num_nan} NaN values.")
        if num_inf:
            problems.append(f"{name} holds {num_inf} infinite values.")
    return problems


def _initialize_score(model: PreTrainedModel, seed: int) -> None:
    """A new scalar head: N(0, 1 / (d + 1)), as Stiennon et al. 2020; a bias starts at 0."""
    for name, parameter in model.get_submodule("score").named_parameters():
        if name == "bias":
            parameter.data.zero_()
    weight = model.get_parameter("score.weight")
    generator = torch.Generator().manual_seed(seed)
    std = (weight.shape[-1] + 1) ** -0.5
    weight.data = (torch.randn(weight.shape, generator=generator) * std).to(weight.dtype)


def _network_error(error: BaseException) -> str:
    """What the system said about a connection. Texts of the hub's client may hold a token."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


@contextmanager
def unreadable(what: str) -> Iterator[None]:
    """Inside, whatever a library raises about files that it reads becomes a ModelError that begins with `what`. A lack
    of memory does not, and errors of this package stay as they are."""
    try:
        yield
    except (RlhfError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = _first_line(error)
        kind = "" if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: "
        raise ModelError(f"{what}: {kind}{text}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
