"""What is read of a model's folder without running it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import described_folder, local_folder, read_model
from rlhf.config.tokenizer_files import different_tokens, require_tokenizer

Make = Callable[..., Path]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def safetensors(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A float32 file of zeros."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(name: str = "model", vocab: int = 8, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        facts = {"model_type": "llama", "vocab_size": vocab, "max_position_embeddings": 64} | config
        (folder / "config.json").write_text(json.dumps(facts))
        weights = {"model.embed_tokens.weight": (vocab, 4), "norm": (4,)}
        (folder / "model.safetensors").write_bytes(safetensors(weights))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return build


def test_a_whole_model(make: Make) -> None:
    folder = make(architectures=["LlamaForSequenceClassification"], id2label={"0": "score"})
    facts = read_model(folder)
    assert (facts.vocab_size, facts.context, facts.num_labels, facts.has_own_code) == (8, 64, 1, False)
    assert not facts.has_chat_template
    require_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_model(folder).has_chat_template


def test_a_language_model_has_no_labels(make: Make) -> None:
    assert read_model(make(architectures=["LlamaForCausalLM"])).num_labels is None
    assert read_model(make(architectures=["LlamaForSequenceClassification"])).num_labels == 2


def replace(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def gguf_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4.gguf")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (replace("config.json", None), "has no config.json"),
        (replace("config.json", b"{"), "is not JSON"),
        (replace("config.json", b"[" * 100_000), "is not JSON"),
        (replace("config.json", b"[]"), "is not a JSON object"),
        (replace("config.json", b"{}"), 'no "model_type"'),
        (replace("config.json", b"\xff"), "is not JSON"),
        (
            replace("config.json", LFS_POINTER),
            "config.json: a pointer of Git LFS in place of the file; run `git lfs pull`",
        ),
        (replace("model.safetensors", LFS_POINTER), "model.safetensors: a pointer of Git LFS in place of the file"),
        (replace("model.safetensors", None), "has no model.safetensors"),
        (replace("model.safetensors", b""), "damaged safetensors header"),
        (replace("model.safetensors", b"\xff" * 100), "damaged safetensors header"),
        (replace("model.safetensors", struct.pack("<Q", 2) + b"[]"), "damaged safetensors header"),
        (replace("model.safetensors", struct.pack("<Q", 7) + b'{"a":1}'), "damaged safetensors header"),
        (replace("model.safetensors", safetensors({"lm_head.weight": (9, 4)})), "lm_head.weight: shape [9, 4]"),
        (replace("model.safetensors", safetensors({"a": (2,)}).replace(b"[2]", b"[3]")), "damaged safetensors header"),
        (pickle_only, "only pickle weights (pytorch_model.bin); convert them to safetensors"),
        (
            without_index,
            "it has 1 other .safetensors (first: model-00001-of-00001.safetensors) and no model.safetensors.i",
        ),
        (gguf_only, "model-Q4.gguf cannot be trained. Name the model that it was made from."),
        (cut, "where its header says"),
        (lost_shard, "cannot be read: No such file"),
    ],
)
def test_a_damaged_model_is_named(make: Make, damage: Callable[[Path], None], said: str) -> None:
    folder = make()
    damage(folder)
    with pytest.raises(ModelFileError) as raised:
        read_model(folder)
    assert said in str(raised.value)


def test_every_cut_of_a_file_is_seen(make: Make) -> None:
    folder = make()
    whole = (folder / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_model(folder)


def test_a_missing_tokenizer_is_named(make: Make) -> None:
    folder = make()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match="has no tokenizer"):
        require_tokenizer(folder)


BPE = {"model": {"vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}}, "added_tokens": [{"id": 0, "special": True}]}


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (BPE, (0, 3)),
        ({"model": {"vocab": {"<pad>": 0, "a": 1, "b": 2, "ba": 3}}}, (1, 3)),
        ({"model": {"vocab": {"a": 2, "b": 1}}, "added_tokens": []}, (2, 2)),
        ({"model": {"vocab": [["<unk>", 0.0], ["a", -1.0], ["c", -2.5]]}}, (1, 2)),
    ],
)
def test_tokens_that_stand_for_other_text_are_counted(make: Make, other: object, found: tuple[int, int]) -> None:
    ours, theirs = make("ours"), make("theirs")
    (ours / "tokenizer.json").write_text(json.dumps(BPE))
    (theirs / "tokenizer.json").write_text(json.dumps(other))
    assert different_tokens(ours, theirs) == found


def test_tokenizers_that_cannot_be_compared(make: Make) -> None:
    ours, theirs = make("ours"), make("theirs")
    (ours / "tokenizer.json").write_text(json.dumps(BPE))
    with pytest.raises(ModelFileError, match=r"theirs/tokenizer.json: no vocabulary in it\.$"):
        different_tokens(ours, theirs)
    (theirs / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"theirs has no tokenizer.json\.$"):
        different_tokens(ours, theirs)


def test_names_of_models(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make()
    (tmp_path / "file").write_text("")
    environ = {"HF_HOME": str(tmp_path / "hf")}
    assert local_folder("model", environ) == Path("model")
    assert local_folder("org/name", environ) is None
    for wrong in ("./nowhere", "model/nowhere", "a/b/c", "/nowhere", "file", "a b"):
        with pytest.raises(ModelFileError):
            local_folder(wrong, environ)
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE"):
        local_folder("org/name", environ | {"HF_HUB_OFFLINE": "1"})


def test_a_hub_model_in_the_cache_is_read(make: Make, tmp_path: Path) -> None:
    hub = tmp_path / "hf" / "hub" / "models--org--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    (hub / "refs" / "main").write_text("abc\n")
    make().rename(hub / "snapshots" / "abc")
    assert local_folder("org/name", {"HF_HOME": str(tmp_path / "hf")}) == hub / "snapshots" / "abc"


@pytest.mark.parametrize("places", [None, {"norm": "model-1-of-2.safetensors", "lm_head": "model-2-of-2.safetensors"}])
def test_a_hub_model_that_is_here_in_part_is_not_here(make: Make, tmp_path: Path, places: object) -> None:
    """As `rlhf plan` leaves it, which fetches config.json alone; or a download that was cut."""
    hub = tmp_path / "hf" / "hub" / "models--org--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    (hub / "refs" / "main").write_text("abc\n")
    snapshot = make().rename(hub / "snapshots" / "abc")
    (snapshot / "model.safetensors").unlink()
    if places is not None:
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        (snapshot / "model-1-of-2.safetensors").write_bytes(safetensors({"norm": (4,)}))
    environ = {"HF_HOME": str(tmp_path / "hf")}
    assert local_folder("org/name", environ) is None
    assert described_folder("org/name", environ) == snapshot
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE"):
        local_folder("org/name", environ | {"HF_HUB_OFFLINE": "1"})


def write_json(name: str, content: object) -> Callable[[Path], None]:
    return replace(name, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            write_json("adapter_config.json", {"base_model_name_or_path": "org/base"}),
            "holds a LoRA adapter of org/base",
        ),
        (write_json("generation_config.json", {"eos_token_id": "</s>"}), "eos_token_id is '</s>', need a token id"),
        (write_json("generation_config.json", {"eos_token_id": [1, "2"]}), "need a token id or a list of token ids"),
        (write_json("generation_config.json", {"pad_token_id": True}), "pad_token_id is 'True'"),
        (write_json("generation_config.json", []), "generation_config.json is not a JSON object"),
        (
            write_json("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 8}}}),
            "ids up to 8, model.embed_tokens.weight has 8",
        ),
        (write_json("tokenizer.json", {"added_tokens": [{"id": 9}]}), "the tokenizer has ids up to 9"),
        (write_json("tokenizer_config.json", {"added_tokens_decoder": {"11": {}}}), "the tokenizer has ids up to 11"),
    ],
)
def test_a_file_that_contradicts_the_model_is_named(make: Make, damage: Callable[[Path], None], said: str) -> None:
    folder = make()
    damage(folder)
    with pytest.raises(ModelFileError) as raised:
        read_model(folder)
    assert said in str(raised.value)


def test_an_adapter_without_a_model_says_how_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"AutoPeftModelForCausalLM.from_pretrained\(.*merge_and_unload"):
        read_model(tmp_path)


def test_a_tokenizer_as_large_as_the_embeddings_fits(make: Make) -> None:
    folder = make()
    write_json("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 3}, {}, 5]})(folder)
    read_model(folder)


def test_a_shard_that_lacks_what_the_index_promises_is_named(make: Make) -> None:
    folder = make()
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    places = {"model.embed_tokens.weight": "model-1.safetensors", "norm": "model-1.safetensors"}
    write_json("model.safetensors.index.json", {"weight_map": places})(folder)
    read_model(folder)
    write_json("model.safetensors.index.json", {"weight_map": {**places, "lost": "model-1.safetensors"}})(folder)
    with pytest.raises(ModelFileError, match=r"model-1.safetensors lacks 1 weights of the index \(first: lost\)"):
        read_model(folder)
    write_json("model.safetensors.index.json", {"weight_map": {"norm": "../model-1.safetensors"}})(folder)
    with pytest.raises(ModelFileError, match="need the name of a file in the folder"):
        read_model(folder)
