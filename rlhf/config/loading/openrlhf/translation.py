"""A command line in OpenRLHF's flags, put into this project's own."""

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rlhf.config.loading.openrlhf.dotted import ALIKE, DOTTED
from rlhf.config.loading.openrlhf.entries import Entry, Given, Outcome
from rlhf.config.loading.openrlhf.flat import FLAT
from rlhf.config.loading.openrlhf.flat_names import DOTTED_NAMES

SWITCH = "--openrlhf"
"""Reads the flags that both projects have as OpenRLHF's."""
ADDED_UP = frozenset({"cluster.colocate"})
"""Lists to which several flags of theirs add."""
FLAT_NAMES = {dotted: flat for flat, dotted in reversed(list(DOTTED_NAMES.items()))}
DOTTED_FLAG = re.compile(r"--([a-z_]+(?:\.[a-z_]+)+)")


@dataclass(frozen=True, slots=True)
class Became:
    """A flag of theirs as it was typed, and what it became."""

    typed: str
    words: tuple[str, ...]
    outcome: Outcome

    @property
    def own_words(self) -> list[str]:
        """The words of this project's own flags."""
        return [word for key, value in self.outcome.settings for word in (f"--{key.replace('_', '-')}", value)]

    def __str__(self) -> str:
        note = f" ({self.outcome.note})" if self.outcome.note else ""
        if self.outcome.settings:
            return f"{shlex.join((self.typed, *self.words))} became {shlex.join(self.own_words)}{note}"
        return f"{self.typed} sets nothing ({self.outcome.nothing})"


@dataclass(slots=True)
class Translation:
    """`argv` is the command line without flags of theirs, and `became` says what each one became. `spoiled` are keys
    that a flag with a problem should have set."""

    argv: list[str] = field(default_factory=list)
    became: list[Became] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)

    @property
    def lines(self) -> list[str]:
        """What each flag became, one line each."""
        return [str(one) for one in self.became]


@dataclass(frozen=True, slots=True)
class _Read:
    """One piece of a command line: a flag of theirs with its words, or with `entry` None anything else."""

    typed: str
    words: tuple[str, ...] = ()
    name: str = ""
    entry: Entry | None = None
    problem: str = ""

    @property
    def dotted(self) -> str:
        """The flag's name in the dotted releases."""
        return DOTTED_NAMES.get(self.name, self.name)


def translate(argv: Sequence[str], known: Collection[str]) -> Translation:
    """`argv` with OpenRLHF's flags in this project's own, in the same order.

    `known` are the keys of the command. Flags without dots are always theirs. Flags with dots that are spelled like
    keys of this project (ALIKE) are theirs where another flag has dots and is only theirs, or with `--openrlhf`; a key
    that is given by `--set` never is. Where they repeat a flag, the last one counts.
    """
    pieces = list(_pieces(argv, is_on=_is_on(argv)))
    flags = {piece.dotted: piece.words for piece in pieces if piece.entry is not None}
    last = {piece.dotted: index for index, piece in enumerate(pieces) if piece.entry is not None}
    found = Translation()
    setters: dict[str, tuple[str, str]] = {}
    for index, piece in enumerate(pieces):
        if piece.problem:
            found.problems.append(f"{piece.typed}: {piece.problem}")
        elif piece.entry is None:
            found.argv.append(piece.typed)
        elif last[piece.dotted] == index:
            given = Given(name=piece.name, words=piece.words, flags=flags, known=known)
            outcome = piece.entry.outcome(given)
            outcome = outcome if "." in piece.name else _in_flat_names(outcome)
            _add(found, Became(piece.typed, piece.words, outcome), setters)
    return found


def _in_flat_names(outcome: Outcome) -> Outcome:
    """An outcome that names other flags of theirs as they are spelled without dots."""

    def respelled(text: str) -> str:
        return DOTTED_FLAG.sub(lambda match: f"--{FLAT_NAMES.get(match[1], match[1])}", text)

    return replace(
        outcome,
        nothing=respelled(outcome.nothing),
        problem=respelled(outcome.problem),
        note=respelled(outcome.note),
    )


def _add(found: Translation, became: Became, setters: dict[str, tuple[str, str]]) -> None:
    """Add what one flag became, unless another flag of theirs set the same key to something else. `setters` are the
    values of the keys that were set, each with the flag that did."""
    outcome = became.outcome
    if outcome.problem:
        found.problems.append(f"{became.typed}: {outcome.problem}")
        found.spoiled.update(outcome.spoils)
        return
    own = {key: value for key, value in outcome.settings if key not in ADDED_UP}
    for key, value in own.items():
        other, typed = setters.setdefault(key, (value, became.typed))
        if other != value:
            text = f"{became.typed}: would set {key} to {value}, and {typed} sets it to {other}. Leave one of them out."
            found.problems.append(text)
            found.spoiled.add(key)
    found.became.append(became)
    found.argv += became.own_words


def entry_of(name: str) -> Entry | None:
    """The entry of a flag of theirs, by its name without dashes and in underscores."""
    return FLAT.get(name) or DOTTED.get(name)


def _is_on(argv: Sequence[str]) -> bool:
    """Whether flags that both projects have are theirs."""
    names = {_name(word) for word in argv if word.startswith("--")}
    return SWITCH in argv or any("." in name and name in DOTTED and name not in ALIKE for name in names)


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _pieces(argv: Sequence[str], *, is_on: bool) -> Iterator[_Read]:
    """The flags of theirs with their words, and all other words one by one."""
    waiting = list(reversed(argv))
    while waiting:
        word = waiting.pop()
        name = _name(word)
        entry = entry_of(name) if word.startswith("--") and (is_on or name not in ALIKE) else None
        if word == "--set" and waiting:
            yield _Read(word)
            yield _Read(waiting.pop())
        elif word == SWITCH:
            continue
        elif entry is None:
            yield _Read(word)
        else:
            yield _with_words(word, name, entry, waiting)


def _with_words(word: str, name: str, entry: Entry, waiting: list[str]) -> _Read:
    """A flag of theirs with the words that belong to it, which are taken from `waiting`."""
    typed, equals, text = word.partition("=")
    words = [text] if equals else []
    need = entry.num_words
    while waiting and (need is None or len(words) < need) and not waiting[-1].startswith("--"):
        words.append(waiting.pop())
    problem = ""
    if need == 0 and equals:
        problem = f"takes no value (got {text}). Leave it out if it is not meant."
    elif need is None and not words:
        problem = "needs a value."
    elif need is not None and len(words) < need:
        problem = "needs a value." if need == 1 else f"needs {need} values (got {len(words)})."
    return _Read(typed, tuple(words), name, entry, problem)
