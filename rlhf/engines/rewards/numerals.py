"""Numbers in texts, read exactly and without evaluating anything."""

import re
from collections.abc import Iterator
from fractions import Fraction

from rlhf.engines.rewards.digits import plain

MAX_CHARS = 300
"""A longer number is ignored."""

# Only the digits 0-9: digits of other scripts, and superscripts in particular, do not occur in labels.
UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![)\]])[-+\u2212])?(?:\\?[$€£¥]\s?)?(?P<inner>[-\u2212])?(?P<digits>{UNSIGNED})"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"(?:\s(?P<part>[0-9]+)/(?P<under>[0-9]+)(?![0-9/]|\.[0-9])|/(?P<over>[0-9]+)(?![0-9/]|\.[0-9]))?(?P<percent>\s?\\?%)?"
)
SPACED = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+")
SPACED_END = re.compile(r"(?<![^\s(:=$+-])(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})+(?=[.\s]*$)")
FUNCTION = re.compile(
    r"\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|infty|pm|d?binom|choose)(?![a-zA-Z])|[\u221a\u03c0\u221e\u00b1]|[0-9]\s*!"
)
"""A number under or beside one of these is not the value of the whole text."""
BEFORE = re.compile(r"(?:\\sqrt\s*\{?|\u221a\s*\(?)$")
BEHIND = re.compile(r"\s*(?:\\(?:pi|sqrt)(?![a-zA-Z])|[\u03c0\u221a])")


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
    """The text's number; None if it has none, several different ones (a hedged answer is no answer), or one that is not
    the value of the text, as in `5\\pi`."""
    if FUNCTION.search(text):
        return None
    if SPACED.fullmatch(text.strip()):
        text = text.replace(" ", "")
    found = set(numbers(text, divide_percent=divide_percent))
    return found.pop() if len(found) == 1 else None


def last_number(text: str, *, divide_percent: bool = False) -> Fraction | None:
    """The last number of the text."""
    last = last_match(plain(SPACED_END.sub(lambda found: found[0].replace(" ", ""), text)))
    return None if last is None else value_of(last, divide_percent)


def last_number_text(text: str) -> str | None:
    """The last number as it is written."""
    last = last_match(plain(text))
    return None if last is None else last.group().strip()


def last_match(text: str) -> re.Match[str] | None:
    """The last number; None if it is under a root or multiplies pi, so that it is not what the text ends with."""
    last = None
    for match in NUMBER.finditer(text):
        last = match
    if last is None or BEHIND.match(text, last.end()) or BEFORE.search(text, 0, last.start()):
        return None
    return last


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
