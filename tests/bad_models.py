"""Model folders that cannot be used, each with what a command says about it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def edit_json(name: str, **changes: object) -> Damage:
    """Change keys of a JSON file; None removes one."""

    def edit(folder: Path) -> None:
        file = folder / name
        content = (json.loads(file.read_text()) if file.exists() else {}) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Damage:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return edit


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{1 + (name == UP_PROJ)}.safetensors" for name in weights}
    save_file({n: w for n, w in weights.items() if n != UP_PROJ}, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def become_an_adapter(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    save_file({"lora_A": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def half(weights: dict[str, torch.Tensor]) -> None:
    weights[UP_PROJ] = weights[UP_PROJ][:48].clone()


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights[UP_PROJ].view(-1)[:2].fill_(torch.nan)


BAD_MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "config.json"),
    "config of text": (write("config.json", b"{"), "config.json is not JSON"),
    "unknown type": (edit_json("config.json", model_type="zeppelin"), '"zeppelin", which is not supported'),
    "own code": (edit_json("config.json", auto_map={"AutoConfig": "a.B"}), "needs remote code; review it"),
    "size of text": (edit_json("config.json", hidden_size="sixty"), "config.json"),
    "only pickle": (only_pickle, "only pickle weights (pytorch_model.bin)"),
    "no weights": (remove("model.safetensors"), "safetensors"),
    "lost shard": (lose_a_shard, "model-2.safetensors"),
    "cut": (cut, "model.safetensors"),
    "huge header": (write("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"), "damaged safetensors header"),
    "shape": (edit_weights(half), f"{UP_PROJ}: shape [48, 64], config.json gives [96, 64]"),
    "missing": (edit_weights(lambda weights: weights.pop(UP_PROJ)), f"1 weights are missing (first: {UP_PROJ})"),
    "surplus": (edit_weights(lambda weights: weights.update(extra=torch.ones(2))), "fit nothing in config.json"),
    "adapter": (become_an_adapter, "a LoRA adapter of org/base"),
    "tokens": (edit_json("tokenizer_config.json", added_tokens_decoder={"500": {"content": "x"}}), "ids up to 500"),
    "eos of text": (edit_json("generation_config.json", eos_token_id="</s>"), "eos_token_id is '</s>'"),
    "quantized": (edit_json("config.json", quantization_config={"quant_method": "gptq"}), "quantized weights (gptq)"),
}
"""By name: the damage to a model of `tests.tiny_models`, and a part of the line that names it."""
