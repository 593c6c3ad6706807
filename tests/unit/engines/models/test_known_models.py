"""A model that is known to load without asking transformers does load; where it might not, transformers is asked."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.models.known_models import KnownConfig, loads
from rlhf.engines.models.loading import inspect_model
from rlhf.errors import ModelError
from rlhf.types import Head
from tests.tiny_models import make_policy, make_reward_model, tiny_config

KINDS = ("llama", "mistral", "qwen2", "qwen3")
ODD: tuple[object, ...] = (None, True, 0, -1, 1, 3, 1.5, -0.5, "x", [], [1], {}, {"0": "a"})
HEADS = (
    (Head.LOG_PROBS, False),
    (Head.LOG_PROBS, True),
    (Head.SCORES, True),
    (Head.VALUES, True),
    (Head.SCORES, False),
)


def make(folder: Path, kind: str, **settings: object) -> Path:
    """A tiny random language model of a type."""
    shared = tiny_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    ends = ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config_class: Callable[..., PretrainedConfig] = CONFIG_MAPPING[kind]
    config = config_class(**{name: shared[name] for name in (*names, *ends)}, **settings)
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def change(file: Path, settings: Mapping[str, object]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def transformers_loads(folder: Path, head: Head, *, is_new: bool) -> bool:
    section = TrainedModelSection(model=str(folder)) if is_new else ModelSection(model=str(folder))
    try:
        inspect_model(section, str(folder), head, where="policy.model", new_head=is_new)
    except ModelError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_common_models_are_known(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", kind, tie_word_embeddings=tied)
    for head, is_new in HEADS:
        known = loads(folder, head, is_new=is_new)
        assert known == (head is Head.LOG_PROBS or is_new)
        assert known <= transformers_loads(folder, head, is_new=is_new)


def test_a_scorer_is_known_with_its_own_head(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path / "model")
    assert [loads(folder, head, is_new=is_new) for head, is_new in HEADS] == [False, False, True, True, True]
    for head, is_new in HEADS[2:]:
        assert transformers_loads(folder, head, is_new=is_new)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_scorer_with_other_labels_is_not_known(num_labels: int, tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path / "model", num_labels=num_labels)
    assert not any(loads(folder, head, is_new=is_new) for head, is_new in HEADS)


def num_known(folder: Path, name: str, keys: Iterable[str]) -> int:
    """How often the model is known when a key of its file `name`, or one of `keys`, has an odd value; transformers
    loads each of these."""
    file = folder / name
    text = file.read_text()
    count = 0
    for key in sorted({*json.loads(text), *keys}):
        for value in ODD:
            file.write_text(text)
            change(file, {key: value})
            if loads(folder, Head.LOG_PROBS, is_new=False):
                count += 1
                assert transformers_loads(folder, Head.LOG_PROBS, is_new=False), (key, value)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_known_loads_whatever_its_settings_are(kind: str, tmp_path: Path) -> None:
    keys = (*KnownConfig.model_fields, "rope_scaling", "unknown")
    assert num_known(make(tmp_path / "model", kind), "config.json", keys) > 20


def test_a_model_that_is_known_loads_whatever_its_sampling_is(tmp_path: Path) -> None:
    keys = ("temperature", "top_p", "top_k", "do_sample", "max_length", "repetition_penalty", "x")
    assert num_known(make(tmp_path / "model", "llama"), "generation_config.json", keys) > 10


LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{"rope_scaling": LLAMA_3, "rope_theta": 5e5}, {"rope_parameters": LLAMA_3}])
def test_the_scaling_of_llama_3_is_known(settings: dict[str, object], tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama")
    content = json.loads((folder / "config.json").read_text())
    content.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps({**content, **settings}))
    assert loads(folder, Head.LOG_PROBS, is_new=False)
    assert transformers_loads(folder, Head.LOG_PROBS, is_new=False)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def dropped(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    return dropped


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    def given(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = tensor

    return given


@pytest.mark.parametrize(
    "changed",
    [
        drop("model.norm.weight"),
        drop("lm_head.weight"),
        put("model.norm.weight", torch.zeros(63)),
        put("model.norm.weight", torch.zeros(64, dtype=torch.int64)),
        put("model.layers.2.mlp.up_proj.weight", torch.zeros(96, 64)),
        put("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
    ],
)
def test_other_tensors_are_not_known(changed: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    changed(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not loads(folder, Head.LOG_PROBS, is_new=False)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_or_missing_files_are_not_known(file: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    assert not loads(folder, Head.LOG_PROBS, is_new=False)
    (folder / file).unlink()
    assert not loads(folder, Head.LOG_PROBS, is_new=False)


def test_several_files_are_known_by_their_index_only(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for part, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / part, metadata={"format": "pt"})
    assert not loads(folder, Head.LOG_PROBS, is_new=False)  # beside the one that transformers reads
    (folder / "model.safetensors").unlink()
    assert not loads(folder, Head.LOG_PROBS, is_new=False)
    places = {name: part for part, held in parts.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert loads(folder, Head.LOG_PROBS, is_new=False)
    assert transformers_loads(folder, Head.LOG_PROBS, is_new=False)
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": {names[0]: "other"}}))
    assert not loads(folder, Head.LOG_PROBS, is_new=False)
