"""No file that a user can write ends `rlhf generate` or `rlhf sample` with an internal error, and no index of shards
ends any command with one.

`RLHF_TEST_FILES` is the number of damages of each file.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.cli.main import main
from tests.unit.launch.test_fuzz_files import (
    CHECK,
    COMMANDS,
    FILES,
    NUMBER,
    change_bytes,
    change_json,
    codes_of,
)
from tests.unit.launch.test_fuzz_files import Damage as FileDamage

Damage = Callable[[Path], object]
pytestmark = pytest.mark.timeout(600)
ENGINE = ("--engine", "transformers", "--max-tokens", "2")
GENERATE = ("generate", "model", "--prompt", "a", *ENGINE)
SAMPLE = (
    *("sample", "model", "--data.path", "rows.jsonl", "--data.template", "chat", "--out", "samples.jsonl"),
    *("--max-prompts", "1", "--num-samples", "1", "--max-prompt-tokens", "64", *ENGINE),
)
INDEX = "model/model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SPLIT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def sharded(world: Path) -> Path:
    """The same with the model's weights in two files."""
    weights = load_file(world / "model/model.safetensors")
    (world / "model/model.safetensors").unlink()
    places = {name: SECOND if name >= SPLIT else FIRST for name in weights}
    for file in (FIRST, SECOND):
        shard = {name: weights[name] for name in weights if places[name] == file}
        save_file(shard, world / "model" / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    (world / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    return world


def edit_index(change: Callable[[dict[str, object]], object]) -> Damage:
    """Change the object in the index, in place."""

    def edit(world: Path) -> None:
        index = json.loads((world / INDEX).read_text())
        change(index)
        (world / INDEX).write_text(json.dumps(index))

    return edit


def place(file: object, name: str = SPLIT) -> Damage:
    """Say that one weight is in another file."""

    def change(index: dict[str, object]) -> None:
        places = index["weight_map"]
        assert isinstance(places, dict)
        places[name] = file

    return edit_index(change)


def beside(world: Path) -> None:
    """The second shard outside the model's folder."""
    (world / "model" / SECOND).rename(world / SECOND)
    place(f"../{SECOND}")(world)


def two_in_one(world: Path) -> None:
    """The second shard is the first one."""
    shutil.copy(world / "model" / FIRST, world / "model" / SECOND)


BAD_INDEXES: dict[str, tuple[Damage, str]] = {
    "lost shard": (lambda world: (world / "model" / SECOND).unlink(), SECOND),
    "empty shard": (lambda world: (world / "model" / SECOND).write_bytes(b""), f"{SECOND}: damaged safetensors header"),
    "wrong shard": (two_in_one, f"{SECOND} lacks "),
    "wrong place": (place(FIRST), f"{FIRST} lacks 1 weights of the index (first: {SPLIT})"),
    "unknown place": (place("other.safetensors"), "other.safetensors cannot be read"),
    "outside": (beside, f"{SPLIT} is in '../{SECOND}', need the name of a file in the folder"),
    "absolute": (place("/etc/passwd"), "is in '/etc/passwd', need the name of a file in the folder"),
    "parent": (place(".."), "cannot be read: Is a directory"),
    "itself": (place("."), "is in '.', need the name of a file in the folder"),
    "no name": (place(""), "is in '', need the name of a file in the folder"),
    "a number": (place(1), "is in '1', need the name of a file in the folder"),
    "a list": (place([FIRST]), "need the name of a file in the folder"),
    "NUL": (place("a\0b"), "damaged safetensors header"),
    "long": (place("a" * 300), "cannot be read: File name too long"),
    "a surplus weight": (place(FIRST, "model.layers.9.x"), "lacks 1 weights of the index (first: model.layers.9.x)"),
    "cut": (lambda world: (world / INDEX).write_bytes((world / INDEX).read_bytes()[:-9]), "index.json is not JSON"),
    "deep": (lambda world: (world / INDEX).write_text("[" * 5000), "index.json is not JSON"),
    "other bytes": (lambda world: (world / INDEX).write_bytes(b"\xff\xfe\x00"), "index.json is not JSON"),
    "list": (lambda world: (world / INDEX).write_text("[]"), "index.json is not a JSON object"),
    "no map": (edit_index(lambda index: index.pop("weight_map")), "no weight_map"),
    "empty map": (edit_index(lambda index: index.update(weight_map={})), "no weight_map"),
    "map of text": (edit_index(lambda index: index.update(weight_map="x")), "no weight_map"),
}
"""By name: the damage to a model in two files, and a part of the line that names it."""
CHECKS = (CHECK, GENERATE, SAMPLE)


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_a_bad_index_is_refused_with_its_reason(name: str, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = BAD_INDEXES[name]
    damage(sharded)
    for words in CHECKS:
        code = main(words)
        said = capsys.readouterr().err
        assert (code, reason in said) == (3, True), said
        assert "internal" not in said


@pytest.mark.parametrize("metadata", [None, 1, "x", []])
def test_metadata_of_an_index_that_is_no_object_is_refused(
    metadata: object, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers adds to it."""
    edit_index(lambda index: index.update(metadata=metadata))(sharded)
    for words in CHECKS:
        assert (main(words), "index.json: metadata is no object." in capsys.readouterr().err) == (3, True)


@pytest.mark.parametrize("metadata", [{}, {"total_size": "x"}, {"total_size": -1}])
def test_sizes_in_an_index_are_not_needed(metadata: object, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_index(lambda index: index.update(metadata=metadata))(sharded)
    assert [(main(words), capsys.readouterr().err) for words in CHECKS] == [(0, "")] * 3


def damage_of(name: str, seed: int, world: Path, damages: Sequence[FileDamage]) -> bytes:
    """Damage a file; returns its new content."""
    pick = random.Random(f"{name}/{seed}")
    file = world / name
    content = pick.choice(damages)(file.read_bytes() if file.exists() else b"", pick)
    file.write_bytes(content)
    return content


@pytest.mark.parametrize("seed", range(NUMBER))
def test_no_index_is_an_internal_error(seed: int, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = damage_of(INDEX, seed, sharded, (change_json, change_json, change_bytes))
    assert codes_of([*COMMANDS, GENERATE, SAMPLE], capsys) == [], damaged[:2000]


@pytest.mark.parametrize("seed", range(NUMBER))
@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_is_an_internal_error(
    name: str, seed: int, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damage_of(name, seed + 1000, world, FILES[name])
    commands = (GENERATE, SAMPLE) if name != "rows.jsonl" else (SAMPLE,)
    assert codes_of(commands, capsys) == [], damaged[:2000]


DEEP = b"[" * 100_000
"""JSON that Python refuses with a RecursionError."""


def run_of_the_model(name: str, content: bytes) -> Damage:
    """The model becomes that of a run whose file `name` holds `content`."""

    def change(world: Path) -> None:
        (world / "run").mkdir()
        (world / "model").rename(world / "run/model")
        (world / "run/status.json").write_text("{}")
        (world / "run" / name).write_bytes(content)
        (world / "model").symlink_to("run/model")

    return change


def unfinished_run(content: bytes) -> Damage:
    """The model becomes the folder of a run that has no model yet, with this status."""

    def change(world: Path) -> None:
        shutil.rmtree(world / "model")
        (world / "model").mkdir()
        (world / "model/status.json").write_bytes(content)

    return change


def folder_instead(name: str) -> Damage:
    def change(world: Path) -> None:
        (world / name).unlink(missing_ok=True)
        (world / name).mkdir()

    return change


def samples_before(rows: bytes, settings: bytes) -> Damage:
    """Something lies where the samples go, and beside it."""

    def change(world: Path) -> None:
        (world / "samples.jsonl").write_bytes(rows)
        (world / "samples.jsonl.settings").write_bytes(settings)

    return change


def one_weight_as(dtype: torch.dtype) -> Damage:
    def change(world: Path) -> None:
        weights = load_file(world / "model/model.safetensors")
        weights[SPLIT] = weights[SPLIT].to(dtype)
        save_file(weights, world / "model/model.safetensors", metadata={"format": "pt"})

    return change


STRAY = "model/stray.safetensors"
ODD: dict[str, tuple[Damage, Sequence[int], str]] = {
    "float8": (one_weight_as(torch.float8_e4m3fn), (0, 0, 0), ""),
    "float64": (one_weight_as(torch.float64), (0, 0, 0), ""),
    "stray link": (lambda world: (world / STRAY).symlink_to("nowhere"), (3, 3, 3), "stray.safetensors cannot be read"),
    "a loop": (lambda world: (world / STRAY).symlink_to(STRAY), (3, 3, 3), "stray.safetensors cannot be read"),
    "stray folder": (folder_instead(STRAY), (3, 3, 3), "stray.safetensors cannot be read"),
    "stray bytes": (lambda world: (world / STRAY).write_bytes(b"x"), (3, 3, 3), "stray.safetensors: damaged"),
    "weights folder": (folder_instead("model/model.safetensors"), (3, 3, 3), "model.safetensors"),
    "config folder": (folder_instead("model/config.json"), (3, 3, 3), "config.json"),
    "tokenizer folder": (folder_instead("model/tokenizer.json"), (3, 3, 3), "tokenizer.json"),
    "status deep": (unfinished_run(DEEP), (3, 3, 3), ""),
    "status bytes": (unfinished_run(b"\xff"), (3, 3, 3), ""),
    "status list": (unfinished_run(b"[]"), (3, 3, 3), ""),
    "style deep": (run_of_the_model("config.yaml", b"data: " + DEEP), (0, 0, 0), ""),
    "style bytes": (run_of_the_model("config.yaml", b"\xff\xfe"), (0, 0, 0), ""),
    "style aliases": (run_of_the_model("config.yaml", b"data: &a [*a]"), (0, 0, 0), ""),
    "style list": (run_of_the_model("config.yaml", b"- data"), (0, 0, 0), ""),
    "style numbers": (run_of_the_model("config.yaml", b"data: {template: 1, prompt_format: 7}"), (0, 0, 0), ""),
    "settings deep": (samples_before(b"{}\n", DEEP), (0, 0, 2), "samples.jsonl.settings is damaged"),
    "settings bytes": (samples_before(b"{}\n", b"\xff"), (0, 0, 2), "samples.jsonl.settings is damaged"),
    "settings cut": (samples_before(b"{}\n", b"{"), (0, 0, 2), "samples.jsonl.settings is damaged"),
    "settings list": (samples_before(b"{}\n", b"[]"), (0, 0, 2), "samples.jsonl was made with"),
}
"""By name: what lies in the folder, the codes of CHECKS, and what is said where the code is not 0."""


@pytest.mark.parametrize("name", ODD)
def test_odd_things_in_a_folder_are_no_internal_errors(
    name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place_it, codes, reason = ODD[name]
    place_it(world)
    for words, expected in zip(CHECKS, codes, strict=True):
        code = main(words)
        said = capsys.readouterr().err
        assert (code, not code or reason in said) == (expected, True), said


WRONG: tuple[tuple[str, object, str], ...] = (
    ("sliding_window", -1, "does not compute with its config.json: "),
    ("sliding_window", "wide", "does not compute with its config.json: "),
    ("rms_norm_eps", -0.5, "does not compute with its config.json: "),
    ("rope_parameters", {"rope_type": "linear", "factor": 0}, "does not compute with its config.json: "),
    ("attn_implementation", 1e30, "does not load: "),
    ("attn_implementation", "auto", "does not load: "),
    ("architectures", 3, "config.json: architectures is '3', need a list of names"),
    ("architectures", ["LlamaForCausalLM", None], "need a list of names"),
    ("num_hidden_layers", 10**25, f"num_hidden_layers is {10**25}, and the files hold 21 weights"),
)


@pytest.mark.parametrize("command", [GENERATE, SAMPLE])
@pytest.mark.parametrize(("key", "value", "reason"), WRONG)
def test_settings_that_no_model_computes_with_are_refused(
    key: str, value: object, reason: str, command: Sequence[str], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    code = main(command)
    said = capsys.readouterr().err
    assert (code, reason in said) == (3, True), said


@pytest.mark.parametrize("line", [DEEP, b"\xff", b"{}", b"[]", b'{"id": []}', b"1" * 5000])
def test_samples_that_were_changed_are_no_internal_errors(
    line: bytes, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert codes_of([SAMPLE], capsys) == []
    (world / "samples.jsonl").write_bytes(line + b"\n")
    assert codes_of([SAMPLE], capsys) == []


NOBODY = "~no-user-of-this-name/x"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", NOBODY, *GENERATE[2:]),
        ("sample", NOBODY, *SAMPLE[2:]),
        (*CHECK, "--policy.model", NOBODY),
        (*CHECK, "--data.path", NOBODY),
        (*SAMPLE, "--data.path", NOBODY),
    ],
)
@pytest.mark.usefixtures("world")
def test_the_home_of_nobody_is_a_config_error(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "a path begins with ~ and the name of a user who has no home folder here" in capsys.readouterr().err


@pytest.mark.usefixtures("world")
def test_bytes_on_the_command_line_that_are_no_text_are_a_config_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*GENERATE, "--prompt", "ab\udcff")) == 2
    assert "--prompt: character 3 is not text in UTF-8." in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *((*GENERATE, *more) for more in (("--max-tokens", "1000000000000"), ("--temperature", "1e-320"))),
        (*GENERATE, "--seed", str(2**63 - 1), "--num-samples", "2"),
        ("generate", "model", "--prompt", "", *ENGINE),
        ("generate", "model", "--prompt", "a" * 2000, *ENGINE),
        *((*SAMPLE, "--temperature", "1e-320", *more) for more in (("--top-p", "1e-30"), ("--top-k", str(10**15)))),
        (*SAMPLE, "--max-tokens", "1000000000000"),
        (*SAMPLE, "--seed", str(2**63 - 1)),
        (*SAMPLE, "--out", "rows.jsonl"),
    ],
)
@pytest.mark.usefixtures("world")
def test_no_number_is_an_internal_error(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert codes_of([words], capsys) == []
