"""A checkpoint of a large model in sparse files: random numbers at the beginning of each tensor, holes elsewhere."""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.engines.models.fresh_model import train_tokenizer

DTYPE_BYTES = 2
BLOCK_BYTES = 4096
"""Of random numbers in each tensor, where rank 0's part of it has as many."""
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 2**20
"""What is looked at at once, to tell numbers from zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A Llama. Those of Llama 2 70B, or of a small one with the same structure."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocab: int

    def config(self, num_layers: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )


SEVENTY = Sizes(hidden=8192, intermediate=28672, num_heads=64, num_kv_heads=8, vocab=32000)
SMALL = Sizes(hidden=128, intermediate=384, num_heads=4, num_kv_heads=2, vocab=512)


def write_checkpoint(folder: Path, sizes: Sizes, num_layers: int, num_ranks: int) -> int:
    """Write a checkpoint for `num_ranks` ranks, and return the bytes of its weights as a reader sees them."""
    folder.mkdir(parents=True)
    config = sizes.config(num_layers)
    train_tokenizer(["the quick brown fox jumps over the lazy dog"], 300, folder)
    (folder / "config.json").write_text(config.to_json_string())
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    random = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        offsets = write_header(folder / file, {name: tensors[name] for name in names})
        with (folder / file).open("r+b") as opened:
            for name, offset in offsets.items():
                size = min(BLOCK_BYTES, tensors[name].numel() // num_ranks * DTYPE_BYTES)
                numbers = torch.randn(size // DTYPE_BYTES, generator=random).mul_(0.02).bfloat16()
                opened.seek(offset)
                opened.write(numbers.view(torch.uint8).numpy().tobytes())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.nbytes for tensor in tensors.values())


def write_header(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Write a file of the safetensors format that is one hole but for its header; returns where each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        starts[name] = end
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def save_sparse(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """In place of `safetensors.torch.save_file`: the same content, with holes for zeros."""
    assert dict(metadata) == {"format": "pt"}
    offsets = write_header(path, tensors)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            content = tensor.reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(content), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                if piece.any():
                    file.seek(offsets[name] + start)
                    file.write(piece.tobytes())


def content_of(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of each tensor, and a digest of its numbers that are not zero and their places. Holes are not read."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
            for name, one in header.items():
                if name == "__metadata__":
                    continue
                start, end = (8 + size + offset for offset in one["data_offsets"])
                assert end - start == prod(one["shape"]) * DTYPE_BYTES
                digest = sha256()
                for place, piece in _data(file.fileno(), start, end):
                    (places,) = np.frombuffer(piece, dtype=np.uint8).nonzero()
                    digest.update((places + place).tobytes())
                    digest.update(np.frombuffer(piece, dtype=np.uint8)[places].tobytes())
                found[name] = (tuple(one["shape"]), digest.hexdigest())
    return found


def _data(descriptor: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """What a file holds between two places, without holes: distance from `start`, and at most `PIECE_BYTES`."""
    place = start
    while place < end:
        try:
            place = os.lseek(descriptor, place, os.SEEK_DATA)
        except OSError:  # a hole up to the end of the file
            return
        if place >= end:
            return
        stop = min(end, os.lseek(descriptor, place, os.SEEK_HOLE), place + PIECE_BYTES)
        yield place - start, os.pread(descriptor, stop - place, place)
        place = stop


def disk_bytes(folder: Path) -> int:
    """Bytes that a folder's files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
