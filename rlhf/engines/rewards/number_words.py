"""Numbers written as words: `twenty-five`, `one hundred and five`, `two thirds`, `3rd`, `2.5 million`."""

import re
from fractions import Fraction

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SMALL = {word: value for value, word in enumerate(ONES)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
IRREGULAR = {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
ORDINALS = {f"{word}th": value for word, value in SMALL.items() if value > 3} | IRREGULAR
ORDINALS |= {f"{word[:-1]}ieth": SMALL[word] for word in TENS}
PARTS = {word: value for word, value in ORDINALS.items() if value > 2} | {"half": 2, "quarter": 4}
PARTS |= {f"{word}s": value for word, value in PARTS.items()} | {"halves": 2}
NUMBERED = re.compile(r"(\d+)(?:st|nd|rd|th)")
SCALED = re.compile(rf"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s*({'|'.join(SCALES)})\b", re.IGNORECASE)
MAX_WORDS = 12


def number_of_words(text: str) -> str | None:
    """The number that the whole text spells, as digits or `\\frac{}{}`; None if it spells none."""
    parts = text.lower().replace("-", " ").split()
    if not parts or len(parts) > MAX_WORDS:
        return None
    if (numbered := NUMBERED.fullmatch(text.strip().lower())) is not None:
        return numbered[1]
    under = PARTS.get(parts[-1])
    if under is not None and (over := 1 if parts[:-1] in ([], ["a"]) else _whole(parts[:-1])) is not None:
        is_ordinal = not parts[:-1] and parts[-1] in ORDINALS
        return str(under) if is_ordinal else rf"\frac{{{over}}}{{{under}}}"
    if parts[-1] in ORDINALS and (before := 0 if not parts[:-1] else _whole(parts[:-1])) is not None:
        return str(before + ORDINALS[parts[-1]])
    value = _whole(parts)
    return None if value is None else str(value)


def with_scales(text: str) -> str:
    """`2.5 million` as 2500000."""
    return SCALED.sub(_scaled, text)


def _scaled(match: re.Match[str]) -> str:
    value = Fraction(match[1].replace(",", "")) * SCALES[match[2].lower()]
    return str(value) if value.denominator == 1 else match[0]


def _whole(parts: list[str]) -> int | None:
    """The whole number that these words spell."""
    total = group = 0
    previous = 0
    for place, word in enumerate(parts):
        if word == "and" and 0 < place < len(parts) - 1 and previous >= 100:
            continue
        if word in SMALL and (not previous or previous >= 100 or (previous in range(20, 100) and 0 < SMALL[word] < 10)):
            group, previous = group + SMALL[word], SMALL[word] or 1
        elif word == "hundred" and 0 < group < 100:
            group, previous = group * 100, 100
        elif word in SCALES and group:
            total, group, previous = total + group * SCALES[word], 0, 1000
        else:
            return None
    return total + group
