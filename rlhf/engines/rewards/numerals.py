"""Numbers in texts, read exactly and without evaluating anything."""

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_CHARS = 300
"""A longer number is ignored."""

# Only the digits 0-9: digits of other scripts, and superscripts in particular, do not occur in labels.
UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![)\]])[-+\u2212])?(?:\\?[$€£¥]\s?)?(?P<inner>[-\u2212])?(?P<digits>{UNSIGNED})"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"(?:\s(?P<part>[0-9]+)/(?P<under>[0-9]+)(?![0-9/.])|/(?P<over>[0-9]+)(?![0-9/.]))?(?P<percent>\s?\\?%)?"
)
FRACTION = re.compile(
    r"(?P<whole>(?<![\w.])[0-9]+)?\s*\\[dt]?frac\s?(?:\{([0-9]+)\}\s?\{([0-9]+)\}|([0-9])\s?([0-9])(?![0-9]))"
)
EXPONENT = re.compile(r"(\\(?:text|mathrm|mbox)\s?\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z]+)\s?\^\s?(?:\{-?[0-9]+\}|-?[0-9])")
"""A power of a unit or a variable, whose digits are no answer."""
LATEX_SPACE = re.compile(r"\\[,!;: ]|\{,\}")


def numbers(text: str, *, divide_percent: bool = False) -> Iterator[Fraction]:
    """Every number in the text:

    `-1,234.5`, `$3`, `1/2`, `1 1/2`, `\\frac{1}{2}`, `1\\frac{1}{2}`, `2e-3`, `50%` (0.5 with
    `divide_percent`).
    """
    for match in NUMBER.finditer(plain(text)):
        value = value_of(match, divide_percent)
        if value is not None:
            yield value


def single_number(text: str, *, divide_percent: bool = False) -> Fraction | None:
    """The text's number; None if it has none, or several different ones: a hedged answer is no answer."""
    found = set(numbers(text, divide_percent=divide_percent))
    return found.pop() if len(found) == 1 else None


def last_number(text: str, *, divide_percent: bool = False) -> Fraction | None:
    """The last number of the text."""
    last = last_match(plain(text))
    return None if last is None else value_of(last, divide_percent)


def last_number_text(text: str) -> str | None:
    """The last number as it is written."""
    last = last_match(plain(text))
    return None if last is None else last.group().strip()


def last_match(text: str) -> re.Match[str] | None:
    last = None
    for match in NUMBER.finditer(text):
        last = match
    return last


def plain(text: str) -> str:
    """The text with LaTeX's simple fractions and spaces as plain text, without powers of units."""
    if "^" in text:
        text = EXPONENT.sub(r"\1", text)
    if "\\" not in text and "{" not in text:
        return text
    return FRACTION.sub(_plain_fraction, LATEX_SPACE.sub(lambda found: "," if found.group() == "{,}" else "", text))


def value_of(match: re.Match[str], divide_percent: bool) -> Fraction | None:
    """A match's number; None if it is longer than MAX_CHARS, or divides by zero."""
    if match.end() - match.start() > MAX_CHARS:
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["part"]:
        part, under = int(match["part"]), int(match["under"])
        if part >= under or value.denominator != 1:
            return None
        value += Fraction(part, under)
    if match["over"]:
        over = int(match["over"])
        if over == 0:
            return None
        value /= over
    if match["percent"] and divide_percent:
        value /= 100
    minus = match["sign"] in ("-", "\u2212") or match["inner"] is not None
    return -value if minus else value


def _plain_fraction(match: re.Match[str]) -> str:
    over, under = (match[2], match[3]) if match[2] else (match[4], match[5])
    return f"{match['whole'] or ''} {over}/{under}"
