"""An export has the tensors that a checkpoint has, and loads as the trained model."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.config.models import LoraSection, ModelSection
from rlhf.engines.models.adapters import adapters_of, add_adapters
from rlhf.engines.models.four_bit import four_bit_layers, use_four_bit_layers
from rlhf.engines.models.loading import LoadedModel, load_model
from rlhf.engines.training import stored_model
from rlhf.engines.training.export import check_export, export_model
from rlhf.errors import CheckpointError, ModelError
from rlhf.planning.memory import EXPORT_FILE
from rlhf.types import Head
from tests.rounding import rounded
from tests.tiny_models import FAMILIES, make_family, make_policy

TOKENS = torch.arange(4, 40)[None]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load(folder: Path, **section: object) -> LoadedModel:
    return load_model(
        ModelSection.model_validate(section),
        str(folder),
        Head.LOG_PROBS,
        where="policy.model",
        device=torch.device("cpu"),
        seed=0,
        new_head=False,
    )


def train(model: PreTrainedModel) -> None:
    """Change every parameter and every buffer that a checkpoint stores, each value by another amount."""
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored:
            tensor.data += 1e-2 * torch.randn_like(tensor)


def tensors_in(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def logits(model: PreTrainedModel) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_checkpoints_names_and_loads_as_the_trained_model(family: str, tmp_path: Path) -> None:
    base, folder = make_family(tmp_path / "base", family), tmp_path / "export"
    loaded = load(base)
    train(loaded.model)
    export_model(loaded, folder, LoraSection())
    check_export(loaded, folder, where="policy.model")
    assert tensors_in(folder) == tensors_in(base)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(loaded.model))
    assert json.loads((folder / "config.json").read_text()) == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma4_text", "model.layers.1.layer_scalar"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
    ],
)
def test_an_export_that_lacks_or_changes_a_tensor_is_refused(family: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    loaded = load(make_family(tmp_path / "base", family))
    export_model(loaded, folder, LoraSection())
    whole = load_file(folder / "model.safetensors")
    changed = {**whole, name: whole[name] + 1.0}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"policy\.model: an export of this .* does not load .* differs"):
        check_export(loaded, folder, where="policy.model")
    del changed[name]
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not load as the model that is trained"):
        check_export(loaded, folder, where="policy.model")


def test_small_files_are_carried_as_they_are(tmp_path: Path) -> None:
    base, folder = make_policy(tmp_path / "base"), tmp_path / "export"
    contents = {
        "generation_config.json": '{"do_sample": false, "temperature": 0.6, "top_p": 0.9,\n "eos_token_id": [2, 2]}',
        "chat_template.jinja": "{# ours #}{% for m in messages %}{{ m.content }}{% endfor %}\n\n",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "modeling_own.py": "# not imported\n",
        "tokenizer_config.json": (base / "tokenizer_config.json").read_text() + "\n",
    }
    (base / "additional_chat_templates").mkdir()
    for name, content in contents.items():
        (base / name).write_text(content)
    export_model(load(base), folder, LoraSection())
    assert {name: (folder / name).read_text() for name in contents} == contents
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_dropout_that_training_turned_off_is_as_before_in_the_export(tmp_path: Path) -> None:
    base, folder = make_policy(tmp_path / "base"), tmp_path / "export"
    config = json.loads((base / "config.json").read_text()) | {"attention_dropout": 0.25}
    (base / "config.json").write_text(json.dumps(config))
    loaded = load(base)
    assert loaded.model.config.attention_dropout == 0.0
    export_model(loaded, folder, LoraSection())
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.25


def test_large_weights_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = make_family(tmp_path / "base", "qwen3_moe"), tmp_path / "export"
    monkeypatch.setattr(stored_model, "MAX_SHARD", 50_000)
    loaded = load(base)
    export_model(loaded, folder, LoraSection())
    check_export(loaded, folder, where="policy.model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"].keys() == tensors_in(base).keys()
    assert tensors_in(folder) == tensors_in(base)


@pytest.mark.parametrize("in_four_bits", [False, True], ids=["adapters", "adapters-nf4"])
def test_adapters_are_merged_into_what_is_written(in_four_bits: bool, tmp_path: Path) -> None:
    """In files that each hold a tensor or two; the adapters alone are in a folder of their own."""
    base, folder, lora = make_policy(tmp_path / "base"), tmp_path / "export", LoraSection(rank=4, alpha=8.0)
    loaded = load(base)
    if in_four_bits:
        use_four_bit_layers(loaded.model)
        for layer in four_bit_layers(loaded.model).values():
            layer.quantize(torch.device("cpu"))
    add_adapters(loaded.model, lora, seed=0, where="policy.lora")
    adapters = adapters_of(loaded.model)
    for adapter in adapters.values():
        adapter.up.data.normal_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_model, "MAX_SHARD", 10_000)
        export_model(loaded, folder, lora)
    check_export(loaded, folder, where="policy.model")
    before, files = load_file(base / "model.safetensors"), list(folder.glob("*.safetensors"))
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 5
    assert {name: tensor.shape for name, tensor in after.items()} == {name: one.shape for name, one in before.items()}
    for name, tensor in before.items():
        held = rounded(tensor) if in_four_bits and name in adapters else tensor
        added = 2.0 * adapters[name].up.data @ adapters[name].down.data if name in adapters else 0.0
        torch.testing.assert_close(after[name], held + added, rtol=0.0, atol=1e-5)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_plans_count_files_of_the_size_that_exports_have() -> None:
    assert stored_model.MAX_SHARD == EXPORT_FILE


def test_after_a_refused_file_no_other_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks gather on, and rank 0 with them; the room that is said to be needed is that of what is left."""
    folder, loaded = tmp_path / "export", load(make_family(tmp_path / "base", "qwen3_moe"))
    monkeypatch.setattr(stored_model, "MAX_SHARD", 50_000)
    written: list[str] = []

    def refuse_the_second(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append(path.name)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(stored_model, "save_file", refuse_the_second)
    with pytest.raises(CheckpointError) as caught:
        export_model(loaded, folder, LoraSection())
    (first,) = folder.glob("*.safetensors")
    left = sum(tensor.nbytes for tensor in loaded.model.state_dict().values()) - sum(
        tensor.nbytes for tensor in load_file(first).values()
    )
    assert written == [first.name, "model-00002-of-00008.safetensors"]
    assert f"model-00002-of-00008.safetensors needs about {left / 1e6:.3g} MB" in str(caught.value)
    assert not (folder / "model.safetensors.index.json").exists()


def test_an_export_that_the_disk_refuses_is_an_error_of_its_rank(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/export: cannot be written \(rank 0: Not a directory\)$"):
        export_model(load(make_policy(tmp_path / "base")), tmp_path / "export", LoraSection())


def test_an_error_shows_three_tensors_and_counts_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    loaded = load(make_policy(tmp_path / "base"))
    export_model(loaded, folder, LoraSection())
    weights = load_file(folder / "model.safetensors")
    lost = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    kept = {name: weight for name, weight in weights.items() if name not in lost}
    for added, said in (({}, ""), ({"model.layers.1.extra.weight": torch.ones(1)}, " and 1 more")):
        save_file({**kept, **added}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as caught:
            check_export(loaded, folder, where="policy.model")
        assert str(caught.value) == (
            "policy.model: an export of this LlamaForCausalLM does not load as the model that is trained: "
            f"{'; '.join(f'{name} is missing' for name in lost)}{said}. It cannot be trained here."
        )
    save_file({**weights, **added}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"trained: model\.layers\.1\.extra\.weight is unexpected\. It cannot"):
        check_export(loaded, folder, where="policy.model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="does not load as the model that is trained: "):
        check_export(loaded, folder, where="policy.model")
