"""Writes docs/algorithms.md from the algorithms' own docstrings and defaults: `python -m rlhf.cli.pages.algorithms`."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf.algorithms import algorithm_class, build_algorithm
from rlhf.algorithms.base import Needs
from rlhf.cli.help import bounds_and_variant, kind_of
from rlhf.cli.pages.configuration import default_cell
from rlhf.config.algo import AlgorithmSection, CustomSection
from rlhf.config.base import Section
from rlhf.config.commands import COMMANDS, METHODS, OnlineConfig
from rlhf.config.fields import fields_of, sections_in, variant_of
from rlhf.orchestrator.data.kinds import ROWS
from rlhf.terminal import write
from rlhf.types import Signal

HEAD = """\
# Algorithms

<!-- Written by `python -m rlhf.cli.pages.algorithms`. Edit the docstrings in rlhf/algorithms and rlhf/config. -->

Every method runs in the same loop: sample and score (or read), compute log-probs, compute advantages, learn, sync
weights. [Choosing](choosing.md) says which method fits which data, and
[adding an algorithm](adding_an_algorithm.md) how to write your own. All settings of a run are in
[configuration](configuration.md). Each name below is a command: `rlhf train NAME`.
"""


def kinds_of(command: str) -> tuple[type[AlgorithmSection], ...]:
    """The algorithm sections that a command takes, those of this package."""
    found = sections_in(METHODS[command].config.model_fields["algo"].annotation)
    return tuple(kind for kind in found if issubclass(kind, AlgorithmSection) and kind is not CustomSection)


def models_started(command: str, needs: Needs) -> str:
    """The models, engines and reward sources of a run, in the order in which data passes them."""
    trained = [f"{role} (learns)" for role in needs.trains]
    reference = ["reference"] if Signal.REF_LOG_PROBS in needs.signals and needs.ema_reference is None else []
    online = ["rollout engines", "reward source"] if issubclass(METHODS[command].config, OnlineConfig) else []
    return ", ".join([*trained, *reference, *online])


def options(section: type[Section], prefix: str, like: type[Section] | None = None) -> str:
    """A table of a section's settings, with its own defaults; if `like` is given, only those that differ."""
    known = {(field.name, field.default) for field in fields_of(like, prefix, like())} if like is not None else set()
    rows = []
    for field in fields_of(section, prefix, section()):
        if (field.name.endswith(".type") and not field.variants) or (field.name, field.default) in known:
            continue
        takes = " ".join(part for part in (f"`{kind_of(field)}`", bounds_and_variant(field)) if part)
        meaning = field.meaning
        cells = (f"`{field.name}`", takes, default_cell(field), meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *rows]) + "\n" if rows else ""


def shown_command(command: str, section: type[AlgorithmSection], loss: str | None = None) -> str:
    """An example command line."""
    member = loss or variant_of(section)
    named = member in COMMANDS and COMMANDS[member].method == command
    words = [
        f"rlhf train {member if named else command}",
        "" if named or loss is None else f"--loss {loss}",
        f"--{METHODS[command].model}.model my_model --data.path {METHODS[command].rows}.jsonl",
        "--reward.function rewards:score" if issubclass(METHODS[command].config, OnlineConfig) else "",
        "--train.batch-size 64",
    ]
    return " ".join(word for word in words if word)


def entry(command: str, section: type[AlgorithmSection]) -> Iterator[str]:
    """One algorithm's part of the page."""
    algorithm = algorithm_class(variant_of(section))
    needs = build_algorithm(section()).needs
    yield f"## {variant_of(section)}\n"
    yield f"{inspect.cleandoc(section.__doc__ or '')}\n"
    if isinstance(algorithm, type):
        yield f"{inspect.cleandoc(algorithm.__doc__ or '')}\n"
    yield f"- data: {ROWS[METHODS[command].rows].holds}"
    yield f"- starts: {models_started(command, needs)}\n"
    yield f"```\n{shown_command(command, section)}\n```\n"
    first = kinds_of(command)[0]
    family = section is not first and issubclass(section, first.__mro__[1]) and first.__mro__[1] is not AlgorithmSection
    if family:
        yield f"Options are those of [{variant_of(first)}](#{variant_of(first)}), but for these:\n"
    yield options(section, "algo.", first if family else None)


def losses(command: str, section: type[AlgorithmSection]) -> Iterator[str]:
    """The losses of an algorithm with several."""
    if "loss" not in section.model_fields:
        return
    kinds = sections_in(section.model_fields["loss"].annotation)
    for kind in kinds:
        name = variant_of(kind)
        yield f"### {variant_of(section)} with --loss {name}\n"
        yield f"{inspect.cleandoc(kind.__doc__ or '')}\n"
        yield f"```\n{shown_command(command, section, name)}\n```\n"
        yield options(kind, "algo.loss.")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in METHODS:
        for section in kinds_of(command):
            parts += [*entry(command, section), *losses(command, section)]
    return "\n".join(parts)


def main() -> None:
    """Write the page to the path given, or to stdout."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    else:
        write(page())


if __name__ == "__main__":
    main()
