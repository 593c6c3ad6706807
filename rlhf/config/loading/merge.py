"""Layers of settings merged into one config, and pydantic's errors as messages that name the place."""

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.config.base import Section
from rlhf.config.fields import Field, fields_by_name, nearest, sections_in, variant_of
from rlhf.config.loading.layers import Layer, Origin, Setting, dotted
from rlhf.config.loading.suggestions import advice_on, meant_section
from rlhf.config.loading.yaml_text import KeyPath, Value
from rlhf.config.problems import NOT_A_CHOICE, Problem, choices_of, secret_advice, shown, wording
from rlhf.config.renamed import current_value, warn_renamed

S = TypeVar("S", bound=Section)
MAX_ROUNDS = 20


class Schema(Generic[S]):
    """Which settings there are: `fields` by dotted name, the names of `sections`, and the default type of each section
    with several types (`types`)."""

    def __init__(self, section: type[S]) -> None:
        self.section = section
        self.fields = fields_by_name(section)
        parts = [name.split(".") for name in self.fields]
        self.sections = {".".join(name[:n]) for name in parts for n in range(1, len(name))}
        self.types = _default_types(section, "")


def _default_types(section: type[Section], prefix: str) -> dict[str, str]:
    types: dict[str, str] = {}
    for key, info in section.model_fields.items():
        inner = sections_in(info.annotation)
        if len(inner) > 1 and isinstance(info.default, Section):
            types[prefix + key] = variant_of(type(info.default))
        for kind in inner:
            types |= _default_types(kind, f"{prefix}{key}.")
    return types


class Merged(Generic[S]):
    """All layers as one config, and every problem.

    `problems` are complete lines. `config` has the valid values, with defaults in place of invalid ones, whose keys are
    in `spoiled`; it is None only if no config could be made.
    """

    def __init__(self, schema: Schema[S], layers: Sequence[Layer], elsewhere: Mapping[str, str] | None = None) -> None:
        """`elsewhere` are sections that other schemas have, each with the message for a setting in it."""
        self.schema = schema
        self._elsewhere = dict(elsewhere or {})
        self.problems: list[str] = [problem for layer in layers for problem in layer.problems]
        self.spoiled: set[str] = {key for layer in layers for key in layer.wrong}
        self._origins: dict[KeyPath, Origin] = {}
        self._tree: dict[str, Value] = {}
        for layer in layers:
            for setting in layer.settings:
                self._apply(setting)
        for old, new in {old: new for layer in layers for old, new in layer.renamed.items()}.items():
            warn_renamed(old, new)
        for name, variant in schema.types.items():
            section = self._at(tuple(name.split(".")))
            if isinstance(section, dict):
                section.setdefault("type", variant)
        self.config = self._validated()

    def report(self, problems: Sequence[Problem]) -> list[str]:
        """Lines for problems between values, without those that an invalid value may have caused."""
        return [
            f"{self.where(tuple(problem.keys[0].split('.')))}: {problem.text}"
            for problem in problems
            if not any(self.is_spoiled(key) for key in problem.keys)
        ]

    def where(self, path: KeyPath) -> str:
        """The place that set a value, or its name if it was not set."""
        candidates = ((*path, "type"), *(path[:n] for n in range(len(path), 0, -1)))
        known = next((candidate for candidate in candidates if candidate in self._origins), None)
        return self._origins[known].where(path) if known else dotted(path)

    def is_spoiled(self, key: str) -> bool:
        """Whether there is an invalid value at, below or above a key."""
        return any(f"{key}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{key}.") for bad in self.spoiled)

    def _apply(self, setting: Setting) -> None:
        """Put one setting into the tree, or note what is wrong with it."""
        key = setting.key
        known = self.schema.fields.get(key)
        if known is None:
            if key not in self.schema.sections:
                self._reject(setting)
            elif setting.value not in (None, {}):
                self.problems.append(f"{setting.origin.where(setting.path)}: {_not_a_section(setting, self.schema)}")
            return
        if isinstance(setting.value, bool) and known.kind in (int, float):
            kind = "a whole number" if known.kind is int else "a number"
            self.problems.append(f"{setting.origin.where(setting.path)}: must be {kind} (got {shown(setting.value)}).")
            self.spoiled.add(key)
            return
        node = self._tree
        for part in setting.path[:-1]:
            inner = node.setdefault(str(part), {})
            assert isinstance(inner, dict), "fields are leaves, sections are mappings"
            node = inner
        value = current_value(key, setting.value)
        if value is not setting.value:
            warn_renamed(f"{setting.origin.where(setting.path)}: {setting.value}", str(value))
        node[str(setting.path[-1])] = value
        self._origins[setting.path] = setting.origin

    def _reject(self, setting: Setting) -> None:
        """Note what is wrong with an unknown key; for an unknown section, once."""
        section = str(setting.path[0])
        if section not in self._elsewhere:
            self.problems.append(self._unknown(setting))
        elif advice := self._elsewhere[section]:
            self.problems.append(f"{setting.origin.where(setting.path)}: {advice}")
            self._elsewhere[section] = ""

    def _unknown(self, setting: Setting) -> str:
        where = setting.origin.where(setting.path)
        if secret := secret_advice(setting.key):
            return f"{where}: {secret}"
        if setting.value in (None, {}) and (section := meant_section(setting.key, self.schema.sections)):
            self.spoiled.add(section)
            return f"{where}: unknown key. Did you mean {setting.origin.spell(section)}?"
        advice, meant = advice_on(setting.key, self.schema.fields, setting.origin.spell)
        self.spoiled.update(meant)
        return f"{where}: unknown key. {advice}"

    def _validated(self) -> S | None:
        """Validate; note invalid values and go on without them."""
        before: list[tuple[KeyPath, str]] = []
        for _ in range(MAX_ROUNDS):
            try:
                return self.schema.section.model_validate(self._tree)
            except ValidationError as error:
                wrong = [self._located(details) for details in error.errors(include_url=False)]
            if wrong == before:  # nothing is left to take away
                return None
            before = wrong
            self.problems += [f"{self.where(path)}: {text}" for path, text in wrong]
            if not all([self._remove(path) for path, _ in wrong]):
                return None
        return None

    def _located(self, error: ErrorDetails) -> tuple[KeyPath, str]:
        """Path and message of one of pydantic's errors."""
        path = self._path_of(error["loc"])
        field = self.schema.fields.get(dotted(path))
        text = wording(error, field)
        if error["type"] in NOT_A_CHOICE and isinstance(error["input"], str):
            meant = nearest(error["input"], field.words if field else choices_of(error))
            text += f" Did you mean {meant}?" if meant else ""
        if error["type"] == "extra_forbidden":
            text = self._misplaced(path, field)
        if error["type"] == "missing" and path and isinstance(path[-1], int):
            return path[:-1], f"too few values (got {shown(self._at(path[:-1]))})."
        own, colon, rest = text.partition(": ")
        if error["type"] == "value_error" and colon and own in self._keys_at(path):
            return (*path, own), rest
        return path, text

    def _misplaced(self, path: KeyPath, field: Field | None) -> str:
        """The message for a key that its section has only with another type, or that no item of a list has."""
        if field is not None:
            owners = " or ".join(field.owners)
            return f"only with type {owners}. Set {dotted(path[:-1])}.type {owners}, or remove it."
        meant = nearest(str(path[-1]), self._keys_at(path[:-1]))
        return f"unknown key. Did you mean {meant}?" if meant else "unknown key."

    def _keys_at(self, path: KeyPath) -> list[str]:
        """The keys of a section, or of a list's items, at or above a path."""
        around = (self.schema.fields.get(dotted(path[: n + 1])) for n in range(len(path)))
        inside = [key for known in around if known is not None for key in known.item_keys]
        prefix = f"{dotted(path)}."
        return inside + [name.removeprefix(prefix) for name in self.schema.fields if name.startswith(prefix)]

    def _path_of(self, location: Sequence[str | int]) -> KeyPath:
        """pydantic's location without the types that it inserts for unions."""
        node: Value = self._tree
        path: list[str | int] = []
        tag_read = False
        for part in location:
            if isinstance(node, dict) and not tag_read and node.get("type") == part:
                tag_read = True
                continue
            tag_read = False
            path.append(part)
            match node, part:
                case dict(), str():
                    node = node.get(part)
                case list(), int() if part < len(node):
                    node = node[part]
                case _:
                    node = None
        return tuple(path)

    def _at(self, path: KeyPath) -> Value:
        node: Value = self._tree
        for part in path:
            node = node.get(str(part)) if isinstance(node, dict) else None
        return node

    def _remove(self, path: KeyPath) -> bool:
        """Remove an invalid value from the tree, or the nearest section around a default that other values made
        invalid."""
        for n in range(len(path), 0, -1):
            parent, last = self._at(path[: n - 1]), str(path[n - 1])
            if isinstance(parent, dict) and last in parent:
                del parent[last]
                self.spoiled.add(dotted(path[:n]))
                return True
            if dotted(path[:n]) in self.spoiled:
                return True
        return False


def _not_a_section(setting: Setting, schema: Schema[S]) -> str:
    some = next(name for name in schema.fields if name.startswith(f"{setting.key}."))
    return f"must be a mapping (got {shown(setting.value)}). Set its fields, as {setting.origin.spell(some)}."
