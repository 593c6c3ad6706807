"""Which setting an unknown key was meant to be.

A suggestion is followed without a second look, so that a wrong one trains something else: a key is suggested from the
section that was named, from a table of other systems' names, or, if no known section was named, for a word that is
nearly the same. Nothing is suggested else.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence

from rlhf.config.loading.other_names import BY_LAST_PART, BY_WHOLE_NAME, NOTES, SECTIONS, WITHOUT_A_SETTING
from rlhf.config.renamed import RENAMED_KEYS

ALIKE = 0.75
"""Least similarity of two words of which one is a misspelling of the other, inside one section."""
NEARLY_THE_SAME = 0.85
"""The same where no section was named."""
MAX_LENGTHS_APART = 2
MAX_SUGGESTED = 4
MAX_LISTED = 16


def meant_keys(key: str, known: Collection[str]) -> list[str]:
    """The known dotted keys that an unknown one may have meant, usually one or none. Two that belong together are one
    text, `A & B`.

    Args:
        key: as it was given, with underscores.
        known: every key of the command.
    """
    if elsewhere := key_of_other_systems(key, known):
        return [elsewhere]
    section, dot, rest = key.partition(".")
    if not dot:
        return _by_last_part(key, known)
    sections = {name.partition(".")[0] for name in known if "." in name}
    if section in sections:
        return _inside(section, rest, known)
    named = SECTIONS.get(section) or _closest(section, sections, ALIKE)
    return _inside(named, rest, known) if named in sections else []


def advice_on(key: str, known: Collection[str], spell: Callable[[str], str]) -> tuple[str, list[str]]:
    """What to say about an unknown key, and the keys that are named in it. `spell` writes a key as a user would."""
    if always := WITHOUT_A_SETTING.get(key.rpartition(".")[2]):
        return f"There is no such setting. {always}", []
    meant = [names.split(" & ") for names in meant_keys(key, known)]
    if not meant:
        return listing(key, known), []
    spelled = " or ".join(" and ".join(map(spell, names)) for names in meant)
    note = NOTES.get(key.rpartition(".")[2])
    return f"Did you mean {spelled}?{f' ({note})' if note else ''}", [name for names in meant for name in names]


def meant_section(key: str, sections: Iterable[str]) -> str | None:
    """The known section that an unknown name may have meant."""
    names = list(sections)
    other = SECTIONS.get(key)
    return other if other in names else _closest(key, names, ALIKE)


def listing(key: str, known: Collection[str]) -> str:
    """The settings of the section that a key names, or the sections, as a sentence."""
    section, dot, _ = key.partition(".")
    inside = [name.removeprefix(f"{section}.") for name in known if name.startswith(f"{section}.")]
    if dot and inside:
        more = f" and {len(inside) - MAX_LISTED} more (`--help {section}`)" if len(inside) > MAX_LISTED else ""
        return f"Settings of {section} are {', '.join(inside[:MAX_LISTED])}{more}."
    sections = sorted({name.partition(".")[0] for name in known if "." in name})
    if bare := [name for name in known if "." not in name]:
        return f"Settings are {', '.join([*bare, *(f'{section}.*' for section in sections)])}."
    return f"Sections are {', '.join(sections)}." if sections else "See --help."


def key_of_other_systems(key: str, known: Collection[str]) -> str | None:
    """This project's key for a name of another system, in the section that was named where it is there."""
    section, _, last = key.rpartition(".")
    if key in BY_WHOLE_NAME:
        candidates = BY_WHOLE_NAME[key]
    else:
        theirs = BY_LAST_PART.get(last, ())
        top = section.partition(".")[0]
        own = [f"{SECTIONS.get(top, top)}.{names.partition('.')[2]}" for names in theirs] if top else []
        candidates = (*own, *theirs)
    return next((names for names in candidates if all(name in known for name in names.split(" & "))), None)


def _inside(section: str, rest: str, known: Collection[str]) -> list[str]:
    """The key of a section that is alike, as a whole or in its last part; renamed keys by their old names too."""
    prefix = f"{section}."
    if f"{prefix}{rest}" in known:
        return [f"{prefix}{rest}"]
    inside = {name.removeprefix(prefix): name for name in known if name.startswith(prefix)}
    old = {name.removeprefix(prefix): new for name, new in RENAMED_KEYS.items() if name.startswith(prefix)}
    inside |= {name: new for name, new in old.items() if new in known}
    if (near := _closest(rest, inside, ALIKE)) is not None:
        return [inside[near]]
    last_parts = {name.rpartition(".")[2]: full for name, full in reversed(inside.items())}
    last = rest.rpartition(".")[2]
    near = last if last in last_parts else _closest(last, last_parts, ALIKE)
    return [last_parts[near]] if near is not None else []


def _by_last_part(word: str, known: Collection[str]) -> list[str]:
    """The keys of all sections whose last part is the word, or nearly so; none where that is too many to choose."""
    names = {name.rpartition(".")[2] for name in known}
    near = word if word in names else _closest(word, names, NEARLY_THE_SAME)
    found = [name for name in known if name.rpartition(".")[2] == near]
    return found if len(found) <= MAX_SUGGESTED else []


def _closest(word: str, names: Iterable[str], cutoff: float) -> str | None:
    """The name of which the word is a misspelling: alike, and of nearly the same length, since `optimizer` is no
    misspelling of `swap_optimizer`."""
    near = [name for name in names if abs(len(name) - len(word)) <= MAX_LENGTHS_APART]
    found: Sequence[str] = difflib.get_close_matches(word, near, n=1, cutoff=cutoff)
    return found[0] if found else None
