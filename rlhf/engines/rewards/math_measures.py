"""Reads measures and times exactly: durations, lengths, weights and amounts of money in any of their units, dates and
times of day. Nothing is evaluated."""

import re
from fractions import Fraction

from rlhf.engines.rewards.math_text import UNITS, WORD_MARK

POUND = Fraction(45359237, 100000)
INCH = Fraction(254, 10)
DIMENSIONS: dict[str, dict[str, int | Fraction]] = {
    "time": {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800},
    "length": {
        "millimeter": 1, "centimeter": 10, "meter": 1000, "kilometer": 10**6,
        "inch": INCH, "foot": 12 * INCH, "yard": 36 * INCH, "mile": 63360 * INCH,
    },
    "weight": {"milligram": Fraction(1, 1000), "gram": 1, "kilogram": 1000, "ounce": POUND / 16, "pound": POUND},
    "volume": {"milliliter": 1, "liter": 1000},
    "money": {"cent": 1, "dollar": 100},
}  # fmt: skip
"""How many of a dimension's smallest unit one of each unit is."""
SIZES = {unit: (dimension, Fraction(size)) for dimension, sizes in DIMENSIONS.items() for unit, size in sizes.items()}

NUMBER = r"\d+(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+|\\frac\{\d+\}\{\d+\}"
MEASURE = re.compile(rf"(?P<value>{NUMBER})\s*(?P<unit>[a-z]+)\s*(?:,\s*and\b|,|\band\b)?\s*")
FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")

MONTHS = [
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
]  # fmt: skip
MONTH_OF = {name: number for number, month in enumerate(MONTHS, 1) for name in (month, month[:3])} | {"sept": 9}
NAME = "|".join(sorted(MONTH_OF, key=len, reverse=True))
DAY, YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{3,4})"
DATES = (
    re.compile(rf"(?P<month>{NAME})\.?\s*{DAY}(?:\s*,?\s*{YEAR})?"),
    re.compile(rf"(?:the\s+)?{DAY}\s*(?:of\s+)?(?P<month>{NAME})\.?(?:\s*,?\s*{YEAR})?"),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"),
)
CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(am|pm)?")
NAMED_TIMES = {"noon": 43200, "midnight": 0}


def measure(text: str) -> tuple[str, Fraction] | None:
    """The dimension and the size of `2 hours 30 minutes`, `5 ft 3 in`, `25 cents`; None if the text is not one. The
    units of one measure get smaller: `3 hours and 5 hours` are two."""
    plain = _plain(text)
    total, end, dimension = Fraction(0), 0, ""
    smallest: Fraction | None = None
    while (match := MEASURE.match(plain, end)) is not None:
        found = SIZES.get(UNITS.get(match["unit"], ""))
        value = _value(match["value"])
        if found is None or value is None or (dimension or found[0]) != found[0]:
            return None
        if smallest is not None and found[1] >= smallest:
            return None
        dimension, smallest = found
        total += value * smallest
        end = match.end()
    return (dimension, total) if end and end == len(plain) else None


def date(text: str) -> tuple[int | None, int, int] | None:
    """Year, month and day of a date with a named month, or of `2024-06-20`; None if the text is not one."""
    plain = _plain(text)
    for pattern in DATES:
        if (match := pattern.fullmatch(plain)) is not None:
            month = MONTH_OF.get(match["month"]) or int(match["month"])
            return int(match["year"]) if match["year"] else None, month, int(match["day"])
    return None


def time_of_day(text: str) -> int | None:
    """Seconds since midnight of `3:45 pm`, `15:45`, `7 am`, `noon`; None if the text is not a time."""
    plain = _plain(text)
    if plain in NAMED_TIMES:
        return NAMED_TIMES[plain]
    match = CLOCK.fullmatch(plain)
    if match is None or not (match[2] or match[4]):
        return None
    hour = int(match[1])
    if match[4]:
        hour = hour % 12 + (12 if match[4] == "pm" else 0)
    return hour * 3600 + int(match[2] or 0) * 60 + int(match[3] or 0)


def _plain(text: str) -> str:
    return " ".join(text.replace(WORD_MARK, " ").lower().split())


def _value(text: str) -> Fraction | None:
    fraction = FRACTION.fullmatch(text)
    over, _, under = (fraction[1], "", fraction[2]) if fraction else text.partition("/")
    return None if under and int(under) == 0 else Fraction(over.strip()) / int(under or 1)
