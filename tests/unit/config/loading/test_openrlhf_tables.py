"""The tables of OpenRLHF's flags are whole, and the documentation says what they say."""

import json
from pathlib import Path

import pytest

from rlhf.config.commands import METHODS
from rlhf.config.fields import fields_by_name
from rlhf.config.loading.flags import ALIASES
from rlhf.config.loading.openrlhf.dotted import ALIKE, DOTTED
from rlhf.config.loading.openrlhf.entries import Entry, Own
from rlhf.config.loading.openrlhf.flat import FLAT, REMOVED, UNCHANGED
from rlhf.config.loading.openrlhf.flat_names import DOTTED_NAMES

THEIRS: dict[str, dict[str, int | str]] = json.loads(
    Path(__file__).with_name("openrlhf_flags.json").read_text(encoding="utf-8")
)
"""Flags of OpenRLHF 0.11.2 by command, and those of the dotted releases before it that it no longer has: how many
values each takes, `all` for those that take any number."""
FLAGS = {name: num_words for flags in THEIRS.values() for name, num_words in flags.items()}
FLAT_FLAGS: dict[str, int | str] = json.loads(
    Path(__file__).with_name("openrlhf_flat_flags.json").read_text(encoding="utf-8")
)
"""The flags of the same commands in 0.6.0 to 0.10.1, which have no dots."""
KEYS = {key for method in METHODS.values() for key in fields_by_name(method.config)}
TABLES: dict[str, Entry] = {**FLAT, **DOTTED}


def keys_of(entry: Own) -> set[str]:
    """The keys that an entry may set, with those that decide whether it holds."""
    inner = [keys_of(case) for case in entry.cases.values()]
    needs = {entry.needs} if entry.needs else set()
    return {*entry.keys, *entry.otherwise}.union(needs, *inner)


def test_every_flag_of_the_four_commands_is_known() -> None:
    assert {name: len(flags) for name, flags in THEIRS.items()} == {
        "train_ppo_ray": 167,
        "train_sft": 77,
        "train_rm": 79,
        "train_dpo": 82,
        "train_ppo_ray before 0.11.2": 2,
    }
    assert set(DOTTED) == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_takes_as_many_values_as_theirs(name: str) -> None:
    assert DOTTED[name].num_words == (None if FLAGS[name] == "all" else FLAGS[name])


def test_every_flat_flag_is_known() -> None:
    assert {name for name in FLAT_FLAGS if name not in TABLES} == {"loss"}
    assert set(FLAT) <= set(FLAT_FLAGS)
    assert not set(UNCHANGED) & set(REMOVED)
    assert set(DOTTED_NAMES.values()) <= set(FLAGS)


@pytest.mark.parametrize("name", FLAT_FLAGS)
def test_a_flat_flag_takes_as_many_values_as_theirs(name: str) -> None:
    if name in TABLES:
        assert TABLES[name].num_words == (None if FLAT_FLAGS[name] == "all" else FLAT_FLAGS[name])


def test_flags_that_are_spelled_like_keys_are_listed() -> None:
    assert {name for name in DOTTED if name in KEYS} == ALIKE
    assert not {name for name in TABLES if name in ALIASES}


@pytest.mark.parametrize("name", TABLES)
def test_every_flag_sets_keys_that_exist(name: str) -> None:
    entry = TABLES[name]
    if isinstance(entry, Own):
        assert keys_of(entry) <= KEYS


@pytest.mark.parametrize("name", TABLES)
def test_every_flag_is_set_explained_or_refused(name: str) -> None:
    assert any(TABLES[name].meaning)


def test_the_page_has_every_flag() -> None:
    page = Path(__file__).parents[4].joinpath("docs", "from_openrlhf.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    for name, entry in TABLES.items():
        [row] = [line for line in lines if line.startswith(f"| `--{name}` |")]
        assert [text for text in entry.meaning if text.removesuffix(".") not in row] == [], name
