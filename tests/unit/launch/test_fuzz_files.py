"""No file that a user can write ends a command with an internal error: damaged and strange files of models, tokenizers,
rows and settings are read, or refused with exit code 2 or 3.

`RLHF_TEST_FILES` is the number of damages of each file.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhf.cli.main import main

pytestmark = pytest.mark.timeout(600)
NUMBER = int(os.environ.get("RLHF_TEST_FILES", "2"))
SFT = ("--policy.model", "model", "--data.path", "rows.jsonl", "--data.max-tokens", "64", "--data.template", "chat")
CHECK = ("check", "sft", *SFT, "--train.batch-size", "8", "--train.num-steps", "1")
COMMANDS: tuple[Sequence[str], ...] = (
    CHECK,
    ("plan", "sft", *SFT, "--train.batch-size", "8"),
    ("data", "demonstrations", "--data.path", "rows.jsonl", "--data.template", "chat", "--tokenizer", "model"),
)
STRANGE: tuple[object, ...] = (
    None, True, -1, 0, 7, 1e308, 10**25, 0.5, "", "x", "[/x]", "\u202e", [], {}, [1], ["a", None], {"a": 1}, [[[]]],
    [{"content": 1}], "{{ 1 + 'a' }}", "{% for %}", {"type": "Strange"}, -(2**63), [10**12],
)  # fmt: skip
Damage = Callable[[bytes, random.Random], bytes]


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where a JSON value holds another, at most some of each list."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in list(value.items())[:40]:
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:3]):
            found += places(inner, (*path, index))
    return found


def change_json(content: bytes, pick: random.Random) -> bytes:
    """One value replaced, removed or given another name."""
    value = json.loads(content)
    path = pick.choice(places(value) or [()])
    if not path:
        return json.dumps(pick.choice(STRANGE)).encode()
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if pick.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = pick.choice(STRANGE)
    return json.dumps(value).encode()


def change_bytes(content: bytes, pick: random.Random) -> bytes:
    """Cut off, a byte changed, or another thing altogether."""
    place = pick.randrange(max(len(content), 1))
    return pick.choice(
        [content[:place], content[:place] + bytes([pick.randrange(256)]) + content[place + 1 :], b"", b"[]", b"null",
         b"[" * 5000, b"\xff\xfe\x00", b"PK\x03\x04", content + content]
    )  # fmt: skip


def change_header(content: bytes, pick: random.Random) -> bytes:
    """The JSON header of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = change_json(content[8 : 8 + size], pick)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


TEMPLATES = (
    "{{ messages }}", "{% for m in messages %}{{ m.role + loop.index0 }}{% endfor %}", "{{ 1 / 0 }}", "{% endfor %}",
    "{{ messages[0]['content'] * 10 }}", "{{ raise_exception('no') }}", "{{ undefined.x }}", "{% include 'x' %}", "",
    "{% for m in messages %}{{ m['content'] | fromjson }}{% endfor %}", "{{ messages | map('x') }}",
    "{{ range(10**9) }}",
)  # fmt: skip


def change_template(content: bytes, pick: random.Random) -> bytes:
    return pick.choice([*(text.encode() for text in TEMPLATES), change_bytes(content, pick)])


FILES: dict[str, tuple[Damage, ...]] = {
    "model/config.json": (change_json, change_json, change_bytes),
    "model/generation_config.json": (change_json, change_bytes),
    "model/tokenizer.json": (change_json, change_json, change_bytes),
    "model/tokenizer_config.json": (change_json, change_json, change_bytes),
    "model/chat_template.jinja": (change_template,),
    "model/model.safetensors": (change_header, change_bytes),
    "rows.jsonl": (change_bytes,),
}


def codes_of(commands: Sequence[Sequence[str]], capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str]]:
    """The codes that are neither success nor a mistake of the user's, each with what was said."""
    found = []
    for words in commands:
        code = main(words)
        said = capsys.readouterr().err
        if code not in (0, 2, 3) or "internal" in said:
            found.append((code, said))
    return found


@pytest.mark.parametrize("seed", range(NUMBER))
@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_is_an_internal_error(
    name: str, seed: int, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pick = random.Random(f"{name}/{seed}")
    file = world / name
    content = file.read_bytes() if file.exists() else b""
    damaged = pick.choice(FILES[name])(content, pick)
    file.write_bytes(damaged)
    commands = COMMANDS if name != "rows.jsonl" else (CHECK, COMMANDS[2])
    assert codes_of(commands, capsys) == [], damaged[:2000]


SCHEMAS: tuple[pa.DataType, ...] = (
    pa.int64(), pa.float16(), pa.binary(), pa.list_(pa.string()), pa.struct([("role", pa.string())]), pa.date32(),
    pa.map_(pa.string(), pa.int8()), pa.duration("ns"), pa.decimal256(50, 3), pa.null(), pa.bool_(),
    pa.dictionary(pa.int8(), pa.string()), pa.timestamp("us", "UTC"),
    pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(pa.binary()))])),
)  # fmt: skip


@pytest.mark.parametrize("seed", range(NUMBER))
def test_no_schema_of_a_table_is_an_internal_error(seed: int, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pick = random.Random(f"schema/{seed}")
    names = pick.sample(["prompt", "response", "messages", "label", "tools", "id", "system", "[/x]"], 3)
    table = pa.table({name: pa.nulls(4, pick.choice(SCHEMAS)) for name in names})
    pyarrow.parquet.write_table(table.cast(table.schema), world / "rows.parquet")
    words = ("data", "demonstrations", "--data.path", "rows.parquet", "--data.template", "chat", "--tokenizer", "model")
    assert codes_of([words, ("data", "prompts", *words[2:])], capsys) == [], table.schema


CONFIG = (
    "policy:\n  model: model\n  lr: 1e-5\ndata:\n  path: rows.jsonl\n  template: chat\n  max_tokens: 64\n"
    "train: {batch_size: 8}\n"
)
YAML = (
    ": ", "[", "{", "- ", "&a", "*a", "!!python/object:os.system", "\t", "|", "<<: *a", "[/x]", "2024-13-45", ".inf",
    "0x_", "? ",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(NUMBER))
def test_no_config_file_is_an_internal_error(seed: int, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pick = random.Random(f"config/{seed}")
    place = pick.randrange(len(CONFIG))
    text = CONFIG[:place] + pick.choice(YAML) + CONFIG[place + pick.choice([0, 1, 8]) :]
    (world / "config.yaml").write_text(text)
    assert codes_of([("check", "sft", "config.yaml"), ("plan", "sft", "config.yaml")], capsys) == [], text
