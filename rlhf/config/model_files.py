"""What a model's files say about it, read without a library that could run the model."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_HEADER_BYTES = 100 * 1024 * 1024
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of a number in each of the safetensors formats that this package loads."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")


class ModelFileError(ValueError):
    """A model's file cannot be used. The message says which and why."""


CLASSIFIER = "ForSequenceClassification"
HEAD_LAYERS = re.compile(
    r"(classifier|pre_classifier|classification_head|head|pooler|logits_proj|sequence_summary|v_head|value_head|"
    r"reward_head|regression_head)\."
)
"""Layers of heads other than `score`, at the top of a model."""


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
    other_head: str | None = None
    """Why a sequence classifier cannot be a reward model: it has no score layer at the last token, but another head."""


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
    if cached is not None and _has_weights(cached):
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
    shapes = list(_shapes(folder))
    facts = replace(facts, other_head=other_head(read_config_json(folder), [name for name, _ in shapes]))
    for name, shape in shapes:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and facts.vocab_size not in (None, shape[0]):
            expected = f"config.json has a vocabulary of {facts.vocab_size}"
            raise ModelFileError(f"{name}: shape {list(shape)}, {expected}.")
    return facts


def describe_model(folder: Path) -> ModelFacts:
    """What the small files of a model say. Raises ModelFileError."""
    config = read_config_json(folder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelFileError(f'{folder / "config.json"}: no "model_type".')
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    return ModelFacts(
        folder=folder,
        model_type=model_type,
        vocab_size=_whole(inner.get("vocab_size")),
        context=next((size for key in CONTEXT_KEYS if (size := _whole(inner.get(key)))), None),
        num_labels=_num_labels(config),
        has_chat_template=_has_chat_template(folder),
        has_own_code="auto_map" in config,
    )


def other_head(config: Mapping[str, object], tensors: Iterable[str]) -> str | None:
    """Why a sequence classifier cannot be a reward model, by its class and the names of its tensors; None if it can be
    one, or is no sequence classifier.

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
    return (
        f"a {found} has no score head at the last token (it has {', '.join(heads)}); only decoder models can be reward "
        "models here, others can be served over HTTP (reward.url)."
    )


def read_config_json(folder: Path) -> dict[str, object]:
    """A model's config.json. Raises ModelFileError."""
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        raise ModelFileError(f"{folder} is the folder of a run. Name its model: {folder / 'model'}.")
    return _json(folder / "config.json")


def require_tokenizer(folder: Path) -> None:
    """Raises ModelFileError if there is no tokenizer in the folder."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelFileError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}).")


def different_tokens(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many of the token ids that both folders' tokenizers know stand for different text, and how many ids both
    know. Special tokens, which are often renamed, do not count.

    Raises:
        ModelFileError: there is no tokenizer.json, or it cannot be read.
    """
    one, other = (_tokens(folder / "tokenizer.json") for folder in (ours, theirs))
    shared = one.keys() & other.keys()
    return sum(one[token_id] != other[token_id] for token_id in shared), len(shared)


def _tokens(file: Path) -> dict[int, str]:
    """Id -> text of a tokenizer.json, without the special tokens. The list of a unigram model is in the order of its
    ids."""
    content = _json(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        tokens = {i: str(entry[0]) for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    elif isinstance(vocabulary, dict):
        tokens = {token_id: text for text, token_id in vocabulary.items() if isinstance(token_id, int)}
    else:
        raise ModelFileError(f"{file}: no vocabulary in it.")
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("special") is True:
            tokens.pop(token.get("id", -1), None)
    return tokens


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
    return settings.is_file() and bool(_json(settings).get("chat_template"))


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{file.parent} has no {file.name}.") from None
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{file} is not JSON.") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{file} is not a JSON object.")
    return content


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, from the headers of the files that hold the weights."""
    files = _weight_files(folder)
    if not files and (pickles := _pickles(folder)):
        raise ModelFileError(f"only pickle weights ({pickles[0]}); convert them to safetensors.")
    if not files:
        raise ModelFileError(f"{folder} has no model.safetensors.")
    for file in files:
        yield from _header(file)


def _weight_files(folder: Path) -> list[Path]:
    """The files that should hold the weights; empty if no file says which. Raises ModelFileError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return []
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelFileError(f"{index}: no weight_map.")
    return [folder / str(name) for name in dict.fromkeys(places.values())]


def _pickles(folder: Path) -> list[str]:
    return [name for name in PICKLES if (folder / name).is_file()]


def _has_weights(folder: Path) -> bool:
    """Whether a hub snapshot has weights of any kind, and none of their files is missing."""
    files = _weight_files(folder)
    return all(file.is_file() for file in files) if files else bool(_pickles(folder))


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a safetensors file whose header and size agree.

    Layout: 8 bytes with the header's length n, n bytes of JSON, the tensors' bytes.
    """
    damaged = ModelFileError(f"{file}: damaged safetensors header.")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise damaged
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(header, dict):
        raise damaged
    end = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        match tensor:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
                dtype in ITEM_BITS and all(isinstance(n, int) and n >= 0 for n in shape)
            ):
                if stop - start != math.prod(shape) * ITEM_BITS[dtype] // 8 or not 0 <= start <= stop:
                    raise damaged
                end = max(end, stop)
                yield name, tuple(shape)
            case _:
                raise damaged
    if 8 + length + end != size:
        raise ModelFileError(f"{file}: damaged, {size} bytes where its header says {8 + length + end}.")
