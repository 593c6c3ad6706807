"""Settings and where they come from: a file, the environment, flags. Each layer overrides those before it."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rlhf.config.fields import Field, list_items
from rlhf.config.loading.user_function import import_name
from rlhf.config.loading.yaml_text import Document, KeyPath, Value, YamlError
from rlhf.config.renamed import current_key

MAX_FILE_BYTES = 1024 * 1024
ENVIRONMENT_PREFIX = "RLHF__"
VARIABLE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""`${NAME}` in a file's text stands for the environment variable, `$${NAME}` for the text itself."""

SWITCH_WORDS = {"true": True, "false": False, "on": True, "off": False, "yes": True, "no": False, "1": True, "0": False}
"""What a flag or variable that is a switch may say."""


class Origin(Protocol):
    """Where a value was set, and how keys are written there."""

    def where(self, path: KeyPath) -> str:
        """The place to name in a message about `path`."""
        ...

    def spell(self, key: str) -> str:
        """A key as it is written there."""
        ...


@dataclass(frozen=True, slots=True)
class InFile:
    """A line of a config file."""

    file: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        line = f":{self.lines[known]}" if known else ""
        return f"{self.file}{line}: {dotted(path)}"

    def spell(self, key: str) -> str:
        return key


@dataclass(frozen=True, slots=True)
class InEnvironment:
    """An environment variable."""

    def where(self, path: KeyPath) -> str:
        return self.spell(dotted(path))

    def spell(self, key: str) -> str:
        return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")


@dataclass(frozen=True, slots=True)
class InFlag:
    """A flag of the command line."""

    def where(self, path: KeyPath) -> str:
        return self.spell(dotted(path))

    def spell(self, key: str) -> str:
        return "--" + key.replace("_", "-")


@dataclass(frozen=True, slots=True)
class InPython:
    """A value given from Python."""

    def where(self, path: KeyPath) -> str:
        return dotted(path)

    def spell(self, key: str) -> str:
        return key


@dataclass(frozen=True, slots=True)
class InCommand:
    """The name of the command."""

    name: str

    def where(self, path: KeyPath) -> str:
        return f"{self.name}: {dotted(path)}"

    def spell(self, key: str) -> str:
        return "--" + key.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value for one key."""

    path: KeyPath
    value: Value
    origin: Origin

    @property
    def key(self) -> str:
        return dotted(self.path)


@dataclass(slots=True)
class Layer:
    """All settings of one origin, and what is wrong with them."""

    settings: list[Setting] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    """Keys whose values were given and could not be read."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Places where an old name was given, each with the present name in the same spelling."""

    def set_text(self, path: KeyPath, text: str, origin: Origin, known: Field | None) -> None:
        """Set a value that is given as text."""
        try:
            self.settings.append(Setting(path, value_of(text, known), origin))
        except YamlError as error:
            self.refuse(path, f"not valid YAML: {error.what}.", origin)

    def set_value(self, path: KeyPath, value: Value, origin: Origin, known: Field | None) -> None:
        """Set a value. A list of words or numbers may be one text, as in a flag: `rules: number`."""
        if isinstance(value, str) and known is not None and known.is_list and not list_items(known):
            self.set_text(path, value, origin, known)
        else:
            self.settings.append(Setting(path, value, origin))

    def current(self, path: KeyPath, origin: Origin, known: Collection[str]) -> KeyPath:
        """`path` under its present name. Notes where an old one was given."""
        new = current_key(dotted(path), known)
        if new == dotted(path):
            return path
        self.renamed[origin.where(path)] = origin.spell(new)
        return tuple(new.split("."))

    def refuse_both_names(self) -> None:
        """Note settings that were given under the old and under the present name."""
        seen: set[KeyPath] = set()
        for setting in self.settings:
            if setting.path in seen:
                self.refuse(setting.path, "given twice, under its old name too. Keep the present one.", setting.origin)
            seen.add(setting.path)

    def refuse(self, path: KeyPath, text: str, origin: Origin) -> None:
        """Note that a value was given and is wrong."""
        self.problems.append(f"{origin.where(path)}: {text}")
        self.wrong.add(dotted(path))


def dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in path)


def split_key(key: str) -> tuple[str, ...]:
    """`policy.num-nodes` as a path."""
    return tuple(key.replace("-", "_").split("."))


def value_of(text: str, known: Field | None) -> Value:
    """The value of a text from a flag or the environment: the text itself for a text field, else parsed as YAML.

    A list may be written without brackets.

    Raises:
        YamlError: the text is not YAML.
    """
    if known is None:
        return text
    if known.optional and text in {"null", "none"}:
        return None
    if known.is_text:
        return text
    if known.is_switch and text.lower() in SWITCH_WORDS:
        return SWITCH_WORDS[text.lower()]
    if known.is_list and not text.lstrip().startswith("["):
        return [text] if known.holds_text else Document(f"[{text}]").value
    return Document(text).value


def flattened(
    value: Value, path: KeyPath = (), fields: Mapping[str, Field] | None = None
) -> Iterator[tuple[KeyPath, Value]]:
    """The settings in nested mappings; a list is one value."""
    known = fields.get(dotted(path)) if fields else None
    if isinstance(value, dict) and (value or not path) and not (known and known.is_mapping):
        for key, inner in value.items():
            yield from flattened(inner, (*path, *split_key(key)), fields)
    else:
        yield path, value


def environment_layer(environ: Mapping[str, str], fields: Mapping[str, Field]) -> Layer:
    """`RLHF__POLICY__LR=1e-6` sets policy.lr."""
    layer = Layer()
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            given = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            path = layer.current(given, InEnvironment(), fields)
            layer.set_text(path, environ[name], InEnvironment(), fields.get(dotted(path)))
    layer.refuse_both_names()
    return layer


def python_layer(settings: Mapping[str, object], fields: Mapping[str, Field]) -> Layer:
    """Values given from Python, by dotted key or nested. Paths become text, functions and classes their import
    names, tuples lists."""
    layer, origin = Layer(), InPython()
    for path, value in flattened(_plain(settings, layer, ()), fields=fields):
        layer.set_value(path, value, origin, fields.get(dotted(path)))
    return layer


def _plain(value: object, layer: Layer, path: KeyPath) -> Value:
    """A value as YAML could hold it; what it cannot hold is refused."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case Mapping():
            return {str(key): _plain(inner, layer, (*path, *split_key(str(key)))) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner, layer, path) for inner in value]
    try:
        return import_name(value)
    except ValueError as error:
        layer.refuse(path, f"{error}.", InPython())
        return None


def file_layer(file: Path, environ: Mapping[str, str], fields: Mapping[str, Field]) -> Layer:
    """The settings of a YAML file."""
    try:
        text = text_of(file)
        document = Document(text)
    except OSError as error:
        return Layer(problems=[f"{file}: cannot be read: {error.strerror or error}."])
    except UnicodeDecodeError as error:
        return Layer(problems=[f"{file}: not a text file (not UTF-8 at byte {error.start})."])
    except YamlError as error:
        place = f":{error.line}:{error.column}" if error.line else ""
        return Layer(problems=[f"{file}{place}: not valid YAML: {error.what}."])
    except ValueError as error:
        return Layer(problems=[f"{file}: {error}."])
    if not isinstance(document.value, dict):
        kind = "nothing" if document.value is None else type(document.value).__name__
        return Layer(problems=[f"{file}: not a mapping (got {kind})."])
    lines = {normal_path(path): line for path, line in document.lines.items()}
    given = InFile(str(file), lines)
    layer = Layer()
    origin = InFile(str(file), {layer.current(path, given, fields): line for path, line in lines.items()})
    for path, line in document.repeated:
        first = document.lines[path]
        layer.problems.append(f'{file}:{line}: key "{dotted(path)}" given twice (first at line {first}).')
    for given_path, value in flattened(document.value, fields=fields):
        path = layer.current(given_path, given, fields)
        substituted, missing = substitute(value, environ)
        if missing:
            layer.refuse(path, f"environment variable {' and '.join(missing)} is not set.", origin)
        elif isinstance(substituted, str) and substituted != value:
            layer.set_text(path, substituted, origin, fields.get(dotted(path)))
        else:
            layer.set_value(path, substituted, origin, fields.get(dotted(path)))
    layer.refuse_both_names()
    return layer


def text_of(file: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        ValueError: it is too large or binary.
        OSError: it cannot be read.
    """
    if file.is_dir():
        raise ValueError("is a folder, need a YAML file")
    with file.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError("larger than 1 MiB")
    if b"\0" in data:
        raise ValueError("not a text file")
    return data.decode("utf-8-sig")


def normal_path(path: KeyPath) -> KeyPath:
    """A path of the file in the spelling of the fields."""
    return tuple(part for key in path for part in (split_key(key) if isinstance(key, str) else (key,)))


def substitute(value: Value, environ: Mapping[str, str]) -> tuple[Value, list[str]]:
    """`value` with environment variables in place of `${NAME}`, and the names of variables that are not set."""
    missing: list[str] = []

    def in_text(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        if escaped:
            return match.group()[1:]
        if name not in environ:
            missing.append(name)
        return environ.get(name, "")

    def within(part: Value) -> Value:
        match part:
            case str():
                return VARIABLE.sub(in_text, part)
            case list():
                return [within(item) for item in part]
            case dict():
                return {key: within(item) for key, item in part.items()}
        return part

    return within(value), missing
