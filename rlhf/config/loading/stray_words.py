"""Words of a command line that belong to no flag: config files, and what others were meant for."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from rlhf.config.loading.flags import Flags
from rlhf.config.loading.layers import SWITCH_WORDS, InFlag, Layer
from rlhf.config.loading.suggestions import advice_on

DATA_FILES = (".jsonl", ".csv", ".parquet", ".gz")
"""Endings of files that hold rows and are no config files."""
FLAGS_START = 'Flags start with "--"'
FILE_FIRST = "; one file that ends in .yaml may come before them"


def is_file_name(word: str) -> bool:
    """Whether an argument that belongs to no flag is meant as a config file."""
    if word.lower().endswith((".yaml", ".yml")):
        return True
    if word.lower().endswith(DATA_FILES):
        return False
    with suppress(OSError, ValueError):  # of a name that no file can have
        return Path(word).exists()
    return False


def refused(words: Sequence[str], flags: Flags, known: Collection[str], meant_for: str | None = None) -> Layer:
    """What is wrong with words that belong to no flag, and are neither config files nor a command's own arguments. The
    settings that they were meant for are spoiled.

    Args:
        words: as they were typed.
        flags: the parsed command line that they are from.
        known: every key of the command.
        meant_for: the setting that a plain word was probably meant for.
    """
    layer = Layer()
    for word in words:
        text, meant = _advice(word, flags, known, meant_for)
        layer.problems.append(f"{word}: unexpected argument. {text}")
        layer.wrong.update(meant)
    return layer


def _advice(word: str, flags: Flags, known: Collection[str], meant_for: str | None) -> tuple[str, list[str]]:
    """What to write in place of a word, and the settings that are named."""
    given, equals, value = word.partition("=")
    key = given.lstrip("+~").replace("-", "_")
    if equals and key in known:
        return f"Write {InFlag().spell(key)} {value}.", [key]
    if equals and not word.lower().endswith(DATA_FILES):
        return advice_on(key, known, InFlag().spell)
    if word in flags.after_switch:
        field = flags.after_switch[word]
        values = dict.fromkeys([*SWITCH_WORDS, *field.words])
        return f"{InFlag().spell(field.name)} takes {', '.join(values)}, or nothing for true.", []
    if "data.path" in known and word.lower().endswith(DATA_FILES):
        return f"Write --data.path {word}.", ["data.path"]
    if meant_for is not None:
        quoted = f'"{word}"' if " " in word else word
        return f"Write {InFlag().spell(meant_for)} {quoted}.", [meant_for]
    return f"{FLAGS_START}{FILE_FIRST if flags.takes_file else ''}.", []
