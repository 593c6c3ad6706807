"""The fields of a config by their dotted names: which settings there are, of which kind, within which bounds."""

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import Enum
from functools import cache
from typing import Literal

import annotated_types
from pydantic.fields import FieldInfo

from rlhf.config.base import Section
from rlhf.config.docstrings import attribute_docs


@dataclass(frozen=True, slots=True)
class Field:
    """A setting of `section`.

    `owners` are the values of a `type` that have this field, if only some kinds of a section have it. `variants` are
    the values of a `type` that chooses the kind of a section, each with that kind.
    """

    name: str
    section: type[Section]
    info: FieldInfo
    default: object
    """The value if it is not set."""
    owners: tuple[str, ...] = ()
    variants: Mapping[str, type[Section]] = dataclass_field(default_factory=dict)

    @property
    def kind(self) -> object:
        """The type, without Optional and without bounds."""
        kinds = [bare(kind) for kind in alternatives(self.info.annotation) if kind is not types.NoneType]
        return kinds[0] if len(kinds) == 1 else self.info.annotation

    @property
    def optional(self) -> bool:
        return types.NoneType in alternatives(self.info.annotation)

    @property
    def choices(self) -> tuple[object, ...]:
        """The values of a field with a fixed set of values."""
        if self.variants:
            return tuple(self.variants)
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return tuple(member.value for member in self.kind)
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def is_switch(self) -> bool:
        """Whether a flag without a value means true."""
        return self.kind is bool or any(choice is True for choice in self.choices)

    @property
    def words(self) -> list[str]:
        """The choices as they are typed."""
        return [json.dumps(choice) if isinstance(choice, bool) else str(choice) for choice in self.choices]

    @property
    def meaning(self) -> str:
        """The help text; for a `type`, the help text of each kind."""
        if len(self.variants) > 1:
            return " ".join(f"{kind}: {meaning_of(section, 'type')}" for kind, section in self.variants.items())
        return meaning_of(self.section, self.name.rpartition(".")[2])

    @property
    def is_text(self) -> bool:
        """Whether text from a flag or a variable is the value itself."""
        return self.kind is str or (bool(self.choices) and all(isinstance(choice, str) for choice in self.choices))

    @property
    def is_mapping(self) -> bool:
        """Whether it takes a mapping with keys of the user's own."""
        return typing.get_origin(self.kind) is dict

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def holds_text(self) -> bool:
        """Whether a list's items are text."""
        return self.is_list and bare(typing.get_args(self.kind)[0]) is str

    @property
    def item_keys(self) -> list[str]:
        """The keys of a list's items, where those are sections."""
        return [key for item in list_items(self) for key in item.model_fields]

    @property
    def bounds(self) -> str:
        """The numbers that are allowed: `> 0`, `in [0, 1)`; empty if all are."""
        attached = [*self.info.metadata]
        for kind in alternatives(self.info.annotation):
            attached += typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()
        low = next((f"({short(b.gt)}" for b in attached if isinstance(b, annotated_types.Gt)), "")
        low = next((f"[{short(b.ge)}" for b in attached if isinstance(b, annotated_types.Ge)), low)
        high = next((f"{short(b.lt)})" for b in attached if isinstance(b, annotated_types.Lt)), "")
        high = next((f"{short(b.le)}]" for b in attached if isinstance(b, annotated_types.Le)), high)
        if low and high:
            return f"in {low}, {high}"
        if low:
            return f"{'>=' if low[0] == '[' else '>'} {low[1:]}"
        return f"{'<=' if high[-1] == ']' else '<'} {high[:-1]}" if high else ""


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def first_paragraph(section: type[Section]) -> str:
    """The first paragraph of a section's docstring, on one line."""
    return " ".join((section.__doc__ or "").strip().partition("\n\n")[0].split())


def short(limit: object) -> str:
    """A bound as a person would write it."""
    return "2^63" if limit == 2**63 else str(limit).removesuffix(".0")


def alternatives(kind: object) -> tuple[object, ...]:
    """The members of a union, or the one type that it is."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def bare(kind: object) -> object:
    """`Annotated[X, ...]` without its annotations."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def sections_in(kind: object) -> tuple[type[Section], ...]:
    """The sections that a field's value can be: one, several that are told apart by `type`, or none."""
    members = alternatives(bare(kind))
    return tuple(member for member in members if isinstance(member, type) and issubclass(member, Section))


def list_items(field: Field) -> tuple[type[Section], ...]:
    """The sections that a list's items can be."""
    return sections_in(typing.get_args(field.kind)[0]) if field.is_list else ()


def variant_of(section: type[Section]) -> str:
    """The `type` that tells this section from the others of its union."""
    return str(section.model_fields["type"].default)


def meaning_of(section: type[Section], key: str) -> str:
    """The help text of a field of a section."""
    kinds = [kind for kind in reversed(section.__mro__) if issubclass(kind, Section)]
    return one_line(attribute_docs(kinds).get(key))


def fields_of(section: type[Section], prefix: str = "", values: Section | None = None) -> Iterator[Field]:
    """Every field under a section, depth first, in the order of the source. A field that several kinds of a section
    have comes once.

    `values` are the defaults, if they differ from those of the section.
    """
    for key, info in section.model_fields.items():
        name = f"{prefix}{key}"
        inner = sections_in(info.annotation)
        default: object = info.default if values is None else dict(values)[key]
        inside = default if isinstance(default, Section) else None
        if not inner:
            yield Field(name, section, info, default)
        elif len(inner) == 1:
            yield from fields_of(inner[0], f"{name}.", inside)
        else:
            yield from _fields_of_union(inner, f"{name}.", inside)


def _fields_of_union(kinds: tuple[type[Section], ...], prefix: str, values: Section | None) -> Iterator[Field]:
    """The fields of all kinds of a section, each once; those of the default kind come first."""
    seen: set[str] = set()
    for kind in sorted(kinds, key=lambda kind: not isinstance(values, kind)):
        for field in fields_of(kind, prefix, values if isinstance(values, kind) else None):
            key = field.name.removeprefix(prefix).partition(".")[0]
            owners = tuple(variant_of(other) for other in kinds if key in other.model_fields)
            # Of sections within sections the innermost decides: its type is the one to set.
            owners = field.owners or (owners if len(owners) < len(kinds) else ())
            variants = {variant_of(other): other for other in kinds} if key == "type" else field.variants
            if field.name not in seen:
                yield Field(field.name, field.section, field.info, field.default, owners, variants)
            seen.add(field.name)


@cache
def fields_by_name(section: type[Section]) -> Mapping[str, Field]:
    """Every field under a section by its dotted name."""
    return {field.name: field for field in fields_of(section)}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    alike = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return alike[0] if alike else None
