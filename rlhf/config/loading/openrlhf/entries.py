"""What one of OpenRLHF's flags is here: settings, nothing for a named reason, or refused with what to do."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from rlhf.config.loading.suggestions import key_of_other_systems

MODELS = ("policy", "reference", "critic", "reward")
TRAINED = ("policy", "critic")

Settings = tuple[tuple[str, str], ...]
"""Keys of this project with their values as text."""
Form = Callable[[Sequence[str], Sequence[str]], Settings]
"""Makes settings of keys and of the words that follow a flag."""


@dataclass(frozen=True, slots=True)
class Given:
    """One flag on a command line: its name and words, all flags of theirs beside it, and the command's own keys."""

    name: str
    words: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]]
    known: Collection[str]

    def word_of(self, name: str) -> str | None:
        """The first word of another flag, where that is given."""
        words = self.flags.get(name)
        return words[0] if words else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a flag became. Exactly one of `settings`, `nothing` and `problem` is filled in.

    `note` says what differs although the flag is translated. `spoils` are keys that are wrong because of a problem, so
    that no second problem is reported for them.
    """

    settings: Settings = ()
    nothing: str = ""
    problem: str = ""
    note: str = ""
    spoils: tuple[str, ...] = ()


class Entry(Protocol):
    """One row of the tables."""

    @property
    def num_words(self) -> int | None:
        """How many words follow the flag; None takes all words up to the next flag."""
        ...

    @property
    def meaning(self) -> tuple[str, ...]:
        """What the documentation must say about the flag."""
        ...

    def outcome(self, given: Given) -> Outcome: ...


def same_value(keys: Sequence[str], words: Sequence[str]) -> Settings:
    """Every key gets the same value."""
    return tuple((key, " ".join(words)) for key in keys)


def one_each(keys: Sequence[str], words: Sequence[str]) -> Settings:
    """The first key gets the first word, and so on."""
    return tuple(zip(keys, words, strict=True))


def as_list(keys: Sequence[str], words: Sequence[str]) -> Settings:
    """Every key gets the words as one list."""
    return tuple((key, f"[{', '.join(words)}]") for key in keys)


def item_by_item(keys: Sequence[str], words: Sequence[str]) -> Settings:
    """Every key gets each word, since a list's flag may be repeated."""
    return tuple((key, word) for key in keys for word in words)


def braces(keys: Sequence[str], words: Sequence[str]) -> Settings:
    """`{}` marks the place of the prompt in their templates, `{prompt}` in ours."""
    return tuple((key, " ".join(words).replace("{}", "{prompt}")) for key in keys)


def whole_number(keys: Sequence[str], words: Sequence[str]) -> Settings:
    """A count that they write as 4096.0."""
    return tuple((key, plain(words)) for key in keys)


def plain(words: Sequence[str]) -> str:
    """Words as one text, with numbers in their shortest form: `0.0 1.0` is `0 1`."""
    return " ".join(_shortest(word) for word in words)


def _shortest(word: str) -> str:
    try:
        number = float(word)
    except ValueError:
        return word
    return str(int(number)) if number.is_integer() else repr(number)


@dataclass(frozen=True, slots=True)
class Own:
    """A flag that can be translated by itself.

    `keys` are the settings; `otherwise` those for commands that have none of `keys`. `value` is what a switch sets.
    `needs` is a key that only the commands have for which the translation holds. `never` is the value that asks for
    nothing. `cases` are values that mean something of their own. Where no key can be set, the flag sets nothing if
    there is a reason `why`, and is refused with `refusal` if not, which also spoils the keys `spoils`.
    """

    keys: tuple[str, ...] = ()
    value: str | None = None
    otherwise: tuple[str, ...] = ()
    needs: str = ""
    never: str | None = None
    cases: Mapping[str, "Own"] = field(default_factory=lambda: MappingProxyType({}))
    why: str = ""
    refusal: str = ""
    note: str = ""
    form: Form = same_value
    words: int | None = 1
    spoils: tuple[str, ...] = ()

    @property
    def num_words(self) -> int | None:
        return 0 if self.value is not None else self.words

    @property
    def meaning(self) -> tuple[str, ...]:
        own = (*(f"`{key}`" for key in (*self.keys, *self.otherwise)), self.why, self.refusal, self.note)
        return (*own, *(text for case in self.cases.values() for text in case.meaning))

    def outcome(self, given: Given) -> Outcome:
        case = self.cases.get(plain(given.words))
        return self._outcome(given) if case is None else case._outcome(given)

    def _outcome(self, given: Given) -> Outcome:
        holds = not self.needs or self.needs in given.known
        keys = self._keys_among(given.known) if holds else []
        words = given.words if self.value is None else (self.value,)
        if keys and self.never is not None and plain(words) == self.never:
            return Outcome(nothing=f"{self.never} asks for nothing")
        if keys:
            return Outcome(settings=self.form(keys, words), note=self.note)
        if self.why and holds:
            return Outcome(nothing=self.why)
        return Outcome(problem=self.refusal or _no_such_setting(given), spoils=self.spoils or self.keys)

    def _keys_among(self, known: Collection[str]) -> list[str]:
        return [key for key in self.keys if key in known] or [key for key in self.otherwise if key in known]


def _no_such_setting(given: Given) -> str:
    """The message for a flag of theirs that stands for nothing in this command. Another system may have the name."""
    meant = key_of_other_systems(given.name, given.known)
    advice = f"Did you mean --{meant.replace('_', '-')}?" if meant is not None else "Leave it out."
    return f"this command has no such setting. {advice}"


@dataclass(frozen=True, slots=True)
class Joint:
    """A flag whose meaning depends on flags beside it; `says` is what the documentation says about it."""

    rule: Callable[[Given], Outcome]
    says: str
    num_words: int | None = 1

    @property
    def meaning(self) -> tuple[str, ...]:
        return (self.says,)

    def outcome(self, given: Given) -> Outcome:
        return self.rule(given)


def each(roles: Sequence[str], key: str) -> tuple[str, ...]:
    """The same key of several roles."""
    return tuple(f"{role}.{key}" for role in roles)


def trained(key: str, value: str | None = None, form: Form = same_value, words: int | None = 1) -> Own:
    """A setting of every model that learns: in `rm` that is the reward model."""
    return Own(each(TRAINED, key), value, otherwise=(f"reward.{key}",), form=form, words=words)


def nothing(why: str, words: int | None = 1) -> Own:
    """A flag with one or more words that sets nothing."""
    return Own(why=why, words=words)


def switch_for_nothing(why: str) -> Own:
    """A flag without a value that sets nothing."""
    return Own(why=why, words=0)


def refused(refusal: str, words: int | None = 1, spoils: tuple[str, ...] = ()) -> Own:
    """A flag that is always refused."""
    return Own(refusal=refusal, words=words, spoils=spoils)


def only(value: str, why: str, refusal: str, words: int | None = 1) -> Own:
    """A flag of which one value is what always happens here, and every other one is refused."""
    return Own(cases={value: Own(why=why)}, refusal=refusal, words=words)
