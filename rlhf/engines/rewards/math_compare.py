"""Compares two answers by their structure: lists, tuples, intervals, sets, matrices, quantities, times, texts.

Only what has no structure, a formula, is left to a verifier. Libraries for formulas read words as products of letters
and dates as differences, and drop units and brackets; so each of these is compared here.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlhf.engines.rewards.math_measures import date, measure, time_of_day
from rlhf.engines.rewards.math_text import WORD_MARK, normal, plain_key, tokens, unit_of, words

Verify = Callable[[str, str], bool]
"""Whether two formulas are equal, label first. Raises UnreadableError."""

MAX_PARTS = 50
DATE = re.compile(r"(\d{1,4})[-/.](\d{1,2})[-/.](\d{1,4})")
RATIO = re.compile(r"[^:]+(?::[^:]+)+")
SMALL_RATIO = re.compile(r"\s*\d+\s*:\s*\d\s*")
"""No time of day."""
TO = re.compile(rf"(\d[\d.]*)\s*{WORD_MARK}?\s*to\s*{WORD_MARK}?\s*(\d[\d.]*)")
CHOICE = re.compile(rf"[(\s{WORD_MARK}]*([A-J])(?:[\s{WORD_MARK}]*[).:][\s{WORD_MARK}]*(?P<text>.*)|[\s{WORD_MARK}]*)")
NAMED = re.compile(r"(?:[a-zA-Z]|\\[a-z]+|m?\s*\\angle\s*[A-Z]{1,3})\s*=\s*")
PLUS_MINUS = r"\pm"
BASE = re.compile(r"([0-9A-Fa-f]+)_\{?(\d+)\}?")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
QUANTITY = re.compile(
    rf"(?P<value>[-+]?(?:[\d.]|\\frac\{{[^{{}}]*\}}\{{[^{{}}]*\}}|\([^()]*\)|\\sqrt\{{[^{{}}]*\}}|\\pi|[*^{{}}\s+/])+?)"
    rf"\s*(?P<unit>(?:{WORD_MARK}|[A-Za-z])[^\d\\=<>|,^]*(?:\^\s*\{{?-?\d\}}?[^\d\\=<>|,^]*)*)"
)
OPEN, CLOSE = "([{", ")]}"


class UnreadableError(Exception):
    """A formula cannot be read."""


def equal_answers(label: str, answer: str, verify: Verify) -> bool:
    """Whether an answer is what the label says. Raises UnreadableError where a formula cannot be read."""
    return _equal(normal(label), normal(answer), verify)


def _equal(label: str, answer: str, verify: Verify) -> bool:
    label, answer = _unwrapped(label), _unwrapped(answer)
    if not label or not answer:
        return False
    if plain_key(label) == plain_key(answer):
        return True
    for compare in COMPARISONS:
        verdict = compare(label, answer, verify)
        if verdict is not None:
            return verdict
    return verify(label, answer)


def _unwrapped(text: str) -> str:
    """Without parentheses around everything, and without braces around a command's argument that stands alone."""
    text = text.strip()
    while len(text) > 2 and text[0] == "(" and _closing(text, 0) == len(text) - 1 and len(_split(text[1:-1], ",")) == 1:
        text = text[1:-1].strip()
    return text


def _as_grids(label: str, answer: str, verify: Verify) -> bool | None:
    """Matrices and column vectors by their entries. A vector in another notation has the same entries in order."""
    first, second = _grid(label), _grid(answer)
    if first is None and second is None:
        return None
    if first is not None and second is not None:
        same_shape = [len(row) for row in first] == [len(row) for row in second]
        return same_shape and all(_pairwise(a, b, verify) for a, b in zip(first, second, strict=True))
    ours = _entries(label) if first is None else _vector(first)
    theirs = _entries(answer) if second is None else _vector(second)
    return None if ours is None or theirs is None else _pairwise(ours, theirs, verify)


def _as_containers(label: str, answer: str, verify: Verify) -> bool | None:
    """Tuples, intervals, sets and vectors in brackets; unions of them in any order."""
    if r"\cup" in label or r"\cup" in answer:
        ours, theirs = (text.split(r"\cup") if r"\cup" in text else _listed(text) for text in (label, answer))
        return _any_order(ours, theirs, verify) if len(ours) > 1 and len(theirs) > 1 else None
    first, second = _brackets(label), _brackets(answer)
    if first is None or second is None:
        return None
    kinds, entries = (first[0], second[0]), (_entries(label) or [], _entries(answer) or [])
    if kinds[0] != kinds[1]:
        vectors = {("(", ")"), ("<", ">")}
        return _pairwise(*entries, verify) if {*kinds} <= vectors else False
    if kinds[0] == ("{", "}"):
        return _any_order(*entries, verify)
    return _pairwise(*entries, verify)


def _as_choices(label: str, answer: str, verify: Verify) -> bool | None:
    """The letter of a choice, alone in one of the two: `A` and `(A) 5`."""
    first, second = CHOICE.fullmatch(label), CHOICE.fullmatch(answer)
    if first is None or second is None or bool(first["text"]) == bool(second["text"]):
        return None
    return first[1] == second[1]


def _as_times(label: str, answer: str, verify: Verify) -> bool | None:
    """Dates, times of day, ratios and numbers with a base."""
    dates = date(label), date(answer)
    if dates[0] is not None and dates[1] is not None:
        return dates[0] == dates[1]
    if DATE.fullmatch(label) or DATE.fullmatch(answer):
        return _same_date(label, answer)
    times = time_of_day(label), time_of_day(answer)
    if times[0] is not None and times[1] is not None:
        return times[0] == times[1]
    ratios = [TO.sub(r"\1:\2", text) for text in (label, answer)]
    may_be_ratios = times == (None, None) or any(SMALL_RATIO.fullmatch(text) for text in ratios)
    if may_be_ratios and all(RATIO.fullmatch(text) and not words(text) for text in ratios):
        return _proportional(ratios[0].split(":"), ratios[1].split(":"), verify)
    first, second = BASE.fullmatch(label), BASE.fullmatch(answer)
    if first and second:
        return first[1].lower() == second[1].lower() and first[2] == second[2]
    return False if times != (None, None) else None


def _as_quantities(label: str, answer: str, verify: Verify) -> bool | None:
    """Numbers with units: the same unit, or none in one of the two. Measures in any units of their dimension."""
    first, second = measure(label), measure(answer)
    if first is not None and second is not None:
        return first == second
    first_value, first_unit = _quantity(label)
    second_value, second_unit = _quantity(answer)
    if first_value is None or second_value is None or not (first_unit or second_unit):
        return None
    if first_unit and second_unit and first_unit != second_unit:
        return False
    if first_value.endswith("%") != second_value.endswith("%"):
        return False
    return _equal(first_value, second_value, verify)


def _as_lists(label: str, answer: str, verify: Verify) -> bool | None:
    """Several answers, in any order: separated by commas, `and` or `or`."""
    first, second = _listed(label), _listed(answer)
    if len(first) < 2 and len(second) < 2:
        return None
    if len(first) != len(second) or len(first) > MAX_PARTS:
        return False
    return _any_order(first, second, verify)


def _as_texts(label: str, answer: str, verify: Verify) -> bool | None:
    """Words, and words with numbers, one by one."""
    if not words(label) and not words(answer):
        return None
    return list(tokens(label)) == list(tokens(answer))


def _pairwise(first: Sequence[str], second: Sequence[str], verify: Verify) -> bool:
    return len(first) == len(second) and all(_equal(a, b, verify) for a, b in zip(first, second, strict=True))


def _any_order(first: Sequence[str], second: Sequence[str], verify: Verify) -> bool:
    """Whether each of the first equals one of the second, each of which is used once."""
    left = list(second)
    if len(first) != len(left) or len(first) > MAX_PARTS:
        return False
    for one in first:
        found = next((index for index, other in enumerate(left) if _equal(one, other, verify)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _proportional(first: Sequence[str], second: Sequence[str], verify: Verify) -> bool:
    """Ratios with the same proportions; exact numbers only, else entry by entry."""
    try:
        ours, theirs = [Fraction(part.strip()) for part in first], [Fraction(part.strip()) for part in second]
    except (ValueError, ZeroDivisionError):
        return _pairwise(first, second, verify)
    return len(ours) == len(theirs) and all(a * theirs[0] == b * ours[0] for a, b in zip(ours, theirs, strict=True))


def _same_date(label: str, answer: str) -> bool:
    """Dates of which one at least is in digits, `6/20/2024`: number by number, or day and month in either order."""
    in_digits = [match for match in (DATE.fullmatch(label), DATE.fullmatch(answer)) if match]
    if len(in_digits) == 2:
        return [int(group) for group in in_digits[0].groups()] == [int(group) for group in in_digits[1].groups()]
    named = date(label) or date(answer)
    first, second, year = (int(group) for group in in_digits[0].groups())
    return named in ((year, first, second), (year, second, first))


def _grid(text: str) -> list[list[str]] | None:
    """The rows of a matrix."""
    matrix = MATRIX.fullmatch(text)
    if matrix is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def _vector(grid: Sequence[Sequence[str]]) -> list[str] | None:
    """The entries of a matrix of one row or one column."""
    is_vector = len(grid) == 1 or all(len(row) == 1 for row in grid)
    return [entry for row in grid for entry in row] if is_vector else None


def _brackets(text: str) -> tuple[tuple[str, str], str] | None:
    """The brackets around everything, and what they contain; None if there are none."""
    text = text.replace(r"\{", "\x01").replace(r"\}", "\x02")
    for opening, closing, kind in (("\x01", "\x02", ("{", "}")), (r"\langle", r"\rangle", ("<", ">"))):
        if text.startswith(opening) and text.endswith(closing) and text.count(opening) == 1:
            return kind, text[len(opening) : -len(closing)].replace("\x01", r"\{").replace("\x02", r"\}")
    if text[0] in "([" and text[-1] in ")]" and _closing(text, 0) == len(text) - 1:
        return (text[0], text[-1]), text[1:-1].replace("\x01", r"\{").replace("\x02", r"\}")
    return None


def _entries(text: str) -> list[str] | None:
    found = _brackets(text)
    return None if found is None else _split(found[1], ",")


def _closing(text: str, start: int) -> int:
    """The place where the bracket at `start` closes, whatever kind of bracket closes it; -1 if none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        if depth == 0:
            return place
    return -1


def _split(text: str, separators: str) -> list[str]:
    """Parts between separators outside brackets."""
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in OPEN) - (character in CLOSE)
        if depth == 0 and character in separators:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def _listed(text: str) -> list[str]:
    """The parts of a list, without braces around it."""
    inside = _brackets(text)
    if inside is not None and inside[0] == ("{", "}"):
        text = inside[1]
    spelled = re.sub(rf"{WORD_MARK}\s*(?:,\s*)?(and|or)\s*{WORD_MARK}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ",", text)
    parts = [part for part in _split(spelled, ",;") if part.strip(f" {WORD_MARK}")]
    return [each for part in parts for each in _both_signs(part)]


def _both_signs(text: str) -> list[str]:
    """`3 \\pm 1` as two answers."""
    if text.count(PLUS_MINUS) != 1:
        return [text]
    before, _, after = text.partition(PLUS_MINUS)
    plus = "" if not before.strip() or before.rstrip()[-1] in "=([{," else "+"
    return [f"{before}{plus}{after}", f"{before}-{after.lstrip()}"]


def _quantity(text: str) -> tuple[str | None, str]:
    """A value and its unit: all words behind it. (None, "") if a text with words is not of that form."""
    if not words(text):
        return text, ""
    match = QUANTITY.fullmatch(NAMED.sub("", text, count=1) if NAMED.match(text) else text)
    if match is None or not re.search(r"\d|\\pi", match["value"]):
        return None, ""
    return match["value"].strip(), unit_of(match["unit"])


COMPARISONS = (_as_grids, _as_choices, _as_containers, _as_times, _as_quantities, _as_lists, _as_texts)
