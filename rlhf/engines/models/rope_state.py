"""Rotary embeddings whose frequencies depend on the longest sequence of a pass (longrope), or of all passes so far
(dynamic NTK scaling)."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

CACHED, LIMIT, ORIGINAL = "max_seq_len_cached", "original_max_seq_len", "original_inv_freq"


def forget_longest_sequence(model: nn.Module) -> None:
    """Let frequencies follow the next pass alone, as in a model that was just loaded."""
    for module in model.modules():
        held = vars(module)
        if CACHED not in held or LIMIT not in held or held[CACHED] == held[LIMIT]:
            continue
        setattr(module, CACHED, held[LIMIT])
        for name, frequencies in [*module.named_buffers(recurse=False), *held.items()]:
            if name.endswith(ORIGINAL):
                current = name.replace(ORIGINAL, "inv_freq")
                setattr(module, current, frequencies.to(getattr(module, current).device))


def scaling_starts_at(config: PretrainedConfig) -> int | None:
    """The sequence length beyond which frequencies depend on the length; None if they never do."""
    limits = [_limit(rope, values) for values in _mappings(config.to_dict()) for rope in _ropes(values)]
    return min((limit for limit in limits if limit), default=None)


def _limit(rope: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    kind = rope.get("rope_type", rope.get("type"))
    original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    if kind == "longrope":
        return int(original) if original else None
    return int(values.get("max_position_embeddings") or 0) if kind == "dynamic" else None


def _mappings(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and the configs inside it."""
    yield values
    for inner in values.values():
        if isinstance(inner, Mapping):
            yield from _mappings(inner)


def _ropes(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary embeddings in one config, also by layer type."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if isinstance(rope, Mapping):
            yield rope
            yield from (inner for inner in rope.values() if isinstance(inner, Mapping))
