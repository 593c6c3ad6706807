"""Brings numbers that are written in other ways into plain digits, exactly and without evaluating anything."""

import re
import unicodedata

from rlhf.engines.rewards.number_words import with_scales

FRACTION = re.compile(
    r"(?P<whole>(?<![\w.])[0-9]+)?\s*\\[dt]?frac\s?(?:\{([0-9]+)\}\s?\{([0-9]+)\}|([0-9])\s?([0-9])(?![0-9]))"
)
EXPONENT = re.compile(r"(\\(?:text|mathrm|mbox)\s?\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z]+)\s?\^\s?(?:\{-?[0-9]+\}|-?[0-9])")
"""A power of a unit or a variable, whose digits are no answer."""
LATEX_SPACE = re.compile(r"\\[,!;: ]|\{,\}")
GROUPING = re.compile(r"(?<=[0-9])[_\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
TIMES_TEN = re.compile(
    r"(?<=[0-9])\s*(?:\\times|\\cdot|[\u00d7\u00b7xX*])\s*10\s*(?:\^|\*\*)\s*(?:\{([-+]?[0-9]{1,3})\}|([-+]?[0-9]{1,3}))"
)
POWER = re.compile(r"(?<![\w.])([0-9]{1,6})\s*(?:\^|\*\*)\s*(?:\{(-?[0-9]{1,2})\}|(-?[0-9]{1,2}))(?![0-9])")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")


def plain(text: str) -> str:
    """The text with LaTeX's simple fractions and spaces, signs of fractions, powers and scales as plain numbers, and
    without powers of units: `2\\frac{1}{2}` and `2½` are `2 1/2`, `3 \\times 10^8` is `3e8`, `2.5 million` 2500000."""
    text = GROUPING.sub("", VULGAR.sub(_sign, with_scales(text)))
    if "^" in text or "**" in text:
        text = EXPONENT.sub(r"\1", POWER.sub(_power, TIMES_TEN.sub(_scientific, text)))
    if "\\" not in text and "{" not in text:
        return text
    return FRACTION.sub(_fraction, LATEX_SPACE.sub(lambda found: "," if found.group() == "{,}" else "", text))


def _fraction(match: re.Match[str]) -> str:
    over, under = (match[2], match[3]) if match[2] else (match[4], match[5])
    return f"{match['whole'] or ''}{_gap(match, match['whole'])}{over}/{under}"


def _sign(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"{_gap(match, None)}{over}/{under}"


def _gap(match: re.Match[str], whole: str | None) -> str:
    """A space behind a whole number or a letter; a fraction's sign stays beside it."""
    return " " if whole or (match.start() > 0 and match.string[match.start() - 1].isalnum()) else ""


def _scientific(match: re.Match[str]) -> str:
    return f"e{match[1] or match[2]}"


def _power(match: re.Match[str]) -> str:
    base, exponent = int(match[1]), int(match[2] or match[3])
    if exponent < 0:
        return f"1/{base**-exponent}"
    return str(base**exponent)
