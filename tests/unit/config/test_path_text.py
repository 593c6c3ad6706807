"""Paths in the user's home folder, where no shell has replaced `~`."""

import re

import pytest
from pydantic import TypeAdapter

from rlhf.config import tools
from rlhf.config.base import Section
from rlhf.config.commands import METHODS
from rlhf.config.fields import Field, fields_of, meaning_of
from rlhf.config.reward import HttpSource
from rlhf.launch.run_folder import folder_of

NAMES_A_PATH = re.compile(r"(Config file|File|Folders?|PEM file|The file)\b(?! of a model's)")
READ_WHERE_USED = ("data.path", "data.eval_path")
"""Paths whose reader knows `~`: checkpoints hold them as they were given."""
COMMANDS: list[type[Section]] = [
    *(method.config for method in METHODS.values()),
    *(
        kind
        for kind in vars(tools).values()
        if isinstance(kind, type) and issubclass(kind, Section) and kind.__module__ == tools.__name__
    ),
    HttpSource,  # in a list, of which fields_of gives no fields
]


def paths_of(command: type[Section]) -> list[Field]:
    return [
        field
        for field in fields_of(command)
        if field.name not in READ_WHERE_USED
        and NAMES_A_PATH.match(meaning_of(field.section, field.name.rpartition(".")[2]))
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_home_folder_is_known_in_every_path(command: type[Section], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for field in paths_of(command):
        kind: TypeAdapter[object] = TypeAdapter(field.info.rebuild_annotation())
        if field.kind is str:
            assert kind.validate_python("~/x.jsonl") == "/home/ann/x.jsonl", field.name
        else:
            assert kind.validate_python(["~/x.jsonl"]) == ("/home/ann/x.jsonl",), field.name


def test_paths_are_found_by_their_help() -> None:
    found = {field.name for command in COMMANDS for field in paths_of(command)}
    assert {"run.dir", "reference.cache_dir", "policy.model", "ca_file", "out", "folder", "runs"} <= found


def test_a_run_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = METHODS["sft"].config.model_validate({"run": {"dir": "~/runs", "name": "a"}})
    assert str(folder_of(config)) == "/home/ann/runs/a"
