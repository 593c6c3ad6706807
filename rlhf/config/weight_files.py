"""Names and shapes of a model's tensors, from the headers of its safetensors files."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf.config.json_file import ModelFileError, is_lfs_pointer, lfs_advice, read_json

MAX_HEADER_BYTES = 100 * 1024 * 1024
ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of a number in each of the safetensors formats that this package loads."""
Shapes = Mapping[str, tuple[int, ...]]
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, from the headers of the files that hold the weights.

    Raises:
        ModelFileError: a file is missing or damaged, or lacks a tensor that the index promises.
    """
    files = _weight_files(folder)
    if not files and (pickles := _pickles(folder)):
        raise ModelFileError(f"only pickle weights ({pickles[0]}); convert them to safetensors.")
    if not files:
        raise ModelFileError(f"{folder} has no model.safetensors{_others(folder)}.")
    headers = {file: dict(_header(file)) for file in files}
    for file, promised in files.items():
        lacking = [name for name in promised if name not in headers[file]]
        if lacking:
            raise ModelFileError(f"{file} lacks {len(lacking)} weights of the index (first: {lacking[0]}).")
    return {name: shape for shapes in headers.values() for name, shape in shapes.items()}


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files that should hold the weights, and the tensors that the index promises in each; empty if no file says
    which. Raises ModelFileError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return {folder / "model.safetensors": []}
    if not index.is_file():
        return {}
    content = read_json(index)
    if not isinstance(content.get("metadata", {}), dict):  # transformers adds to it
        raise ModelFileError(f"{index}: metadata is no object.")
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelFileError(f"{index}: no weight_map.")
    files: dict[Path, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ModelFileError(f"{index}: {name} is in {str(file)[:40]!r}, need the name of a file in the folder.")
        files.setdefault(folder / file, []).append(name)
    return files


def _pickles(folder: Path) -> list[str]:
    return [name for name in PICKLES if (folder / name).is_file()]


def _others(folder: Path) -> str:
    """What a folder without the weights has in their place."""
    if shards := sorted(folder.glob("*.safetensors")):
        index = "no model.safetensors.index.json, which says what each holds; copy it too"
        return f"; it has {len(shards)} other .safetensors (first: {shards[0].name}) and {index}"
    if gguf := sorted(folder.glob("*.gguf")):
        return f"; {gguf[0].name} cannot be trained. Name the model that it was made from"
    return ""


def has_weights(folder: Path) -> bool:
    """Whether a hub snapshot has weights of any kind, and none of their files is missing."""
    files = _weight_files(folder)
    return all(file.is_file() for file in files) if files else bool(_pickles(folder))


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a safetensors file whose header and size agree.

    Layout: 8 bytes with the header's length n, n bytes of JSON, the tensors' bytes.
    """
    damaged = ModelFileError(f"{file}: damaged safetensors header.")
    try:
        if is_lfs_pointer(file):
            raise ModelFileError(f"{file}: {lfs_advice(file)}.")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise damaged
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error.strerror}.") from None
    except ModelFileError:
        raise
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
