"""Writes docs/configuration.md from the config's own docstrings: `python -m rlhf.cli.pages.configuration`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf.cli.help import bounds_and_variant, default_of, kind_of
from rlhf.config.base import Section
from rlhf.config.commands import METHODS
from rlhf.config.fields import Field, fields_of, first_paragraph, list_items, sections_in, variant_of
from rlhf.terminal import write

HEAD = """\
# Configuration

<!-- Written by `python -m rlhf.cli.pages.configuration`. Edit the docstrings in rlhf/config instead. -->

A run is described by settings in sections. Each has a default; a YAML file, the environment and flags override it, in
this order:

| where | how | example |
|---|---|---|
| file | nested keys, `${NAME}` for an environment variable, `$${NAME}` for that text itself | `policy: {lr: 1e-6}` |
| environment | `RLHF__SECTION__KEY` | `RLHF__POLICY__LR=1e-6` |
| flag | `--section.key value`, with `-` or `_` | `--policy.lr 1e-6` |

Other ways to write a flag: `--section.key=value`, `--set section.key=value`, `--section.key` and `--no-section.key` for
true and false. The flag of a list may be repeated. Short flags: `--algo`, `--loss`, `--colocate`, `--resume`,
`--run-name`, `--debug`, `--json`.

Numbers may be written as `1e-6`; text in a file needs quotes only where YAML would read something else. A config
never holds secrets: a token is given by the name of an environment variable.

`rlhf check` takes the arguments of `rlhf train` and finds everything that is wrong and can be found without starting
anything. A run saves its whole resolved config as `config.yaml`, which can be given to another run.
"""


def documented_sections() -> Iterator[tuple[str, type[Section], list[str]]]:
    """Every section with the methods that have it, in the order of the methods."""
    found: dict[tuple[str, type[Section]], list[str]] = {}
    for command, method in METHODS.items():
        for name, info in method.config.model_fields.items():
            found.setdefault((name, sections_in(info.annotation)[0]), []).append(command)
    for (name, section), commands in found.items():
        yield name, section, commands


def default_cell(field: Field) -> str:
    """A field's default as a cell of a table."""
    default = default_of(field)
    return f"`{default}`" if default else ""


def row(field: Field) -> str:
    """A field as a row of a table."""
    takes = " ".join(part for part in (f"`{kind_of(field)}`", bounds_and_variant(field)) if part)
    cells = (f"`{field.name}`", takes, default_cell(field), field.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(fields: list[Field]) -> str:
    return "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *map(row, fields)]) + "\n"


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, section, commands in documented_sections():
        where = "every command" if len(commands) == len(METHODS) else " and ".join(f"`{c}`" for c in commands)
        parts.append(f"## {name} ({where})\n\n{first_paragraph(section)}\n")
        fields = list(fields_of(section, f"{name}."))
        parts.append(table(fields))
        for field in fields:
            for item in list_items(field):
                parts.append(
                    f"### An item of {field.name} with `type: {variant_of(item)}`\n\n{first_paragraph(item)}\n"
                )
                parts.append(table(list(fields_of(item))))
    return "\n".join(parts)


def main() -> None:
    """Write the page to the path given, or to stdout."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        write(reference())


if __name__ == "__main__":
    main()
