"""YAML for configs: a safe subset with plain rules, which remembers the line of every key.

Numbers and booleans are those of YAML 1.2: 1e-6 is a number, `no` and `on` are words, 010 is ten, and dates are text.
Tags, anchors and aliases are refused.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import yaml

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"
KeyPath: TypeAlias = tuple[str | int, ...]

WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")
INFINITE = re.compile(r"([-+]?\.inf)|\.nan", re.IGNORECASE)
DEEPEST = 40
PLAINER = {
    "'\\t'": "found a tab; indent with spaces",
    "expected <block end>": "bad indentation; the keys of a section must line up",
    "<stream end>": "a bracket or quote is not closed",
    "end of stream": "a bracket or quote is not closed",
}
"""The parser's words, and plain ones for them."""


COLON = "mapping values are not allowed"
"""The parser's words for a colon that it does not expect, which has three causes."""


class Mark(Protocol):
    """A position in a text, counted from 0."""

    line: int
    column: int


class YamlError(ValueError):
    """The text is not YAML, or not in the subset that is read here. `line` and `column` count from 1."""

    def __init__(self, what: str, mark: "Mark | None" = None) -> None:
        self.what = what
        self.line = mark.line + 1 if mark else 0
        self.column = mark.column + 1 if mark else 0
        super().__init__(what)


class Document:
    """A text's content (`value`), the line of each key (`lines`), and the keys that were given twice (`repeated`: path
    and line of the second time; `lines` has the first)."""

    def __init__(self, text: str) -> None:
        """Raises YamlError if the text cannot be read."""
        self.lines: dict[KeyPath, int] = {}
        self.repeated: list[tuple[KeyPath, int]] = []
        try:
            events = yaml.parse(text, Loader=yaml.SafeLoader)
            self.value = self._document(events)
        except yaml.MarkedYAMLError as error:
            what = error.problem or error.context or "unreadable"
            what = next((plain for cryptic, plain in PLAINER.items() if cryptic in what), what)
            mark = error.problem_mark or error.context_mark
            if COLON in what and mark is not None:
                what = unexpected_colon(text.splitlines()[: mark.line + 1], mark.column)
            raise YamlError(what, mark) from None
        except yaml.YAMLError as error:
            raise YamlError(str(error).splitlines()[0]) from None

    def _document(self, events: Iterator[yaml.Event]) -> Value:
        value: Value = None
        num_documents = 0
        for event in events:
            match event:
                case yaml.DocumentStartEvent():
                    num_documents += 1
                    if num_documents > 1:
                        raise YamlError("more than one document", event.start_mark)
                case yaml.NodeEvent():
                    value = self._value(event, events, ())
        return value

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> Value:
        if len(path) > DEEPEST:
            raise YamlError(f"nested deeper than {DEEPEST}", event.start_mark)
        if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor):
            raise YamlError("anchors and aliases are not read; write the value out", event.start_mark)
        match event:
            case yaml.ScalarEvent():
                self._refuse_tag(event.tag, event)
                return scalar(event.value) if event.implicit[0] else event.value
            case yaml.SequenceStartEvent():
                self._refuse_tag(event.tag, event)
                return self._list(events, path)
            case yaml.MappingStartEvent():
                self._refuse_tag(event.tag, event)
                return self._mapping(events, path)
        raise YamlError("unexpected end", event.start_mark)

    def _list(self, events: Iterator[yaml.Event], path: KeyPath) -> list[Value]:
        items: list[Value] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            inner = (*path, len(items))
            self.lines[inner] = line_of(event)
            items.append(self._value(event, events, inner))
        return items

    def _mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, Value]:
        mapping: dict[str, Value] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlError("a key must be a word", event.start_mark)
            inner = (*path, event.value)
            line = line_of(event)
            value = self._value(next(events), events, inner)
            if event.value in mapping:
                self.repeated.append((inner, line))
                continue
            mapping[event.value] = value
            self.lines[inner] = line
        return mapping

    @staticmethod
    def _refuse_tag(tag: str | None, event: yaml.Event) -> None:
        if tag is not None:
            raise YamlError(f"tags are not read (got {tag})", event.start_mark)


def unexpected_colon(lines: Sequence[str], column: int) -> str:
    """Why the colon at `column` of the last line is not expected: a line that is indented too far, a line above it
    whose colon has no space, or a text with a colon."""
    *above, line = lines
    before = next((other for other in reversed(above) if other.strip() and not other.lstrip().startswith("#")), "")
    if ": " in line[:column]:
        return "a second colon; quote the text"
    if re.match(r"\s*[\w.-]+:\S", before):
        return f"the line above, `{before.strip()}`, needs a space after its colon"
    if _indent(line) > _indent(before):
        return f"bad indentation: `{line[:column].strip()}` is indented further than `{before.strip()}` above it"
    return "a second colon; quote the text"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def line_of(event: yaml.Event) -> int:
    """The line that an event starts on, counted from 1."""
    return event.start_mark.line + 1 if event.start_mark else 0


def scalar(text: str) -> Value:
    """The value of an unquoted word."""
    lowered = text.lower()
    if lowered in WORDS:
        return WORDS[lowered]
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) or INFINITE.fullmatch(text):
        return float(lowered.replace(".inf", "inf").replace(".nan", "nan"))
    return text
