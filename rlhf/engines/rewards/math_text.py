"""Brings answers that are written differently into one form, without evaluating anything: delimiters, signs, units."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from rlhf.engines.rewards.number_words import number_of_words, with_scales

SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u00f7": "/",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\leq ", "\u2265": r"\geq ", "\u2260": r"\neq ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u00b0": r"^\circ ", "\u2205": r"\emptyset ",
    "\u00b1": r"\pm ", "\u2044": "/", "\u03b8": r"\theta ", "\u211d": r"\mathbb{R}", "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ", "\u2032": "'", "\u2019": "'",
}  # fmt: skip
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
ROOT = re.compile(r"\u221a\s*(\w+|\([^()]*\))")
CURRENCIES = {"$": "dollar", "\u20ac": "euro", "\u00a3": "pound", "\u00a5": "yen", "\u20b9": "rupee"}
CURRENCY = re.compile(r"(?P<sign>[-+]?\s*)(?:\\?(?P<symbol>[$€£¥₹]))\s*(?P<number>[-+]?(?:\d[\d,]*\.?\d*|\.\d+))")

EMPHASIS = re.compile(r"^(\*{1,3}|_{1,3})(?=\S)(.*)(?<=\S)\1$", re.DOTALL)
TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|texttt|mathsf)\s*\{([^{}]*)\}"
)
SPACES = re.compile(r"(?<!\\)\\[,;:!> ]|\\q?quad\b|~|\\hspace\{[^{}]*\}")
SIZES = re.compile(r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|textstyle|limits)(?![a-zA-Z])")
GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d])")
MIXED = re.compile(
    r"(?<![\w./^{}\\])(\d+)(?:\s+(\d+)\s*/\s*(\d+)(?![\d/.])|\s*\\frac\s*(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)(?!\d)))"
)
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.])")
TIMES_TEN = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(?:[xX*]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)(?=\s*[{\d-])")
APPROXIMATELY = re.compile(r"(?<=\S)\s*(?:\\approx|\u2248).*", re.DOTALL)
REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
MAX_REPEATING = 12
NAMES = re.compile(r"(?<![\\a-zA-Z])(pi|infinity|infty|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|theta)(?![a-zA-Z])")
ROOT_OF = re.compile(r"\\sqrt\s*\(([^()]*)\)")
COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w*\}|\\[a-zA-Z]+")
COUNTED = re.compile(r"[-+]?[\d./, ]+ [A-Za-z]{2,}")
BESIDE_LETTERS = re.compile(r"[-+*/^_=<>|\\]|\d[a-zA-Z]")
LETTERS = re.compile(r"(?<!\\)(?<![a-zA-Z])[a-zA-Z]+(?:'[a-z]+)?")
SIMPLE_QUANTITY = re.compile(
    r"[-+]?[\d.,/]+\s*[A-Za-z]{1,3}(?:\s*\^?\{?\d\}?)?(?:\s*/\s*[A-Za-z]{1,3}(?:\^?\{?\d\}?)?)?"
)
TOKEN = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)(?:st|nd|rd|th)?(?!\d)|(?P<word>[^\W\d_]+)|[^\s\w\u241f]")
REMAINDER = re.compile(r"\b\d+\s*[rR]\s*\d+\b")
NAMED_BY_LETTERS = re.compile(r"\\(angle|overrightarrow)\s*\{?([A-Z]{2,3})\}?(?![A-Za-z])")
DERIVATIVE = re.compile(r"\\frac\s*\{d([a-zA-Z])\}\s*\{d([a-zA-Z])\}")
PLAIN_SET = re.compile(r"^\{([^{}]*,[^{}]*)\}$")
EMPTY_SET = re.compile(r"\\varnothing|\\\{\s*\\\}")
WORD_MARK = "\u241f"
"""Surrounds what stood in \\text{}: words, however short."""

UNIT_NAMES = {
    "second": "s sec secs", "minute": "min mins", "hour": "h hr hrs", "day": "", "week": "wk wks", "month": "",
    "year": "yr yrs", "millimeter": "mm millimetre", "centimeter": "cm centimetre", "meter": "m metre",
    "kilometer": "km kilometre", "inch": "in inches", "foot": "ft feet", "yard": "yd yds", "mile": "mi",
    "gram": "g", "milligram": "mg", "kilogram": "kg kgs", "pound": "lb lbs", "ounce": "oz", "liter": "l litre",
    "milliliter": "ml millilitre", "dollar": "usd", "euro": "eur", "cent": "", "degree": "deg", "percent": "",
    "mph": "", "kph": "", "kmh": "", "hertz": "hz", "newton": "", "joule": "", "watt": "", "volt": "", "unit": "",
    "square": "sq", "cubic": "cu",
}  # fmt: skip
UNITS = {name: unit for unit, names in UNIT_NAMES.items() for name in (unit, f"{unit}s", *names.split())}
COMPOUNDS = {"mph": "mile hour", "kph": "kilometer hour", "kmh": "kilometer hour", "degree celsius": "celsius",
             "degree c": "celsius", "degree fahrenheit": "fahrenheit", "degree f": "fahrenheit"}  # fmt: skip
PHRASES = {
    "does not exist": f"{WORD_MARK}dne{WORD_MARK}", "dne": f"{WORD_MARK}dne{WORD_MARK}",
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "the empty set": r"\emptyset",
    "empty set": r"\emptyset", r"(-\infty, \infty)": r"\mathbb{R}", r"(-\infty,\infty)": r"\mathbb{R}",
}  # fmt: skip
"""Answers that are spelled in several ways, without marks of words."""
SHORT_UNITS = {name for name in UNITS if len(name) < 4}
SHORT_WORDS = {"and", "or", "no", "yes", "am", "pm", "if", "is", "to", "of", "by", "the", "an", "in", "on", "at", "up"}
"""Short runs of letters that are words and not products of variables."""


def normal(text: str) -> str:
    """An answer without delimiters and emphasis, its numbers and signs in one spelling. What stood in \\text{} is
    surrounded by WORD_MARK; a currency sign is a unit behind its number."""
    text = unicodedata.normalize("NFC", text).strip()
    while (emphasis := EMPHASIS.match(text)) is not None:
        text = emphasis[2].strip()
    for sign, spelling in SIGNS.items():
        if sign in text:
            text = text.replace(sign, spelling)
    text = RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(RAISED)}}}", text)
    text = "".join(_fraction_sign(character) for character in text)
    text = ROOT.sub(lambda root: rf"\sqrt{{{root[1].strip('()')}}}", text)
    text = SIZES.sub("", text.replace(r"\left\{", r"\{").replace(r"\right\}", r"\}"))
    text = text.replace(r"\!", "").replace("{,}", ",").replace(r"\%", "%")
    text = SPACES.sub(" ", re.sub(r"\\[()\[\]]", " ", text))
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("cfrac", "frac")
    text = GROUPED.sub(_joined, text) if not _in_brackets(text) else text
    text = CURRENCY.sub(_with_unit, with_scales(text)).replace("\u00a2", f" {WORD_MARK}cent{WORD_MARK} ")
    text = text.replace(r"\$", "").replace("$", "")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", f" {WORD_MARK}degree{WORD_MARK} ", text)
    while TEXT.search(text):
        text = TEXT.sub(rf" {WORD_MARK}\1{WORD_MARK} ", text)
    text = REPEATING.sub(_repeating, DERIVATIVE.sub(r"\1_{d\2}", MIXED.sub(_mixed, text)))
    text = TIMES_TEN.sub(r"\1 \\times 10^", SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text))
    text = ROOT_OF.sub(r"\\sqrt{\1}", NAMES.sub(_command, text))
    text = re.sub(rf"(?<=[\d}}])\s*{WORD_MARK}?\s*percent\s*{WORD_MARK}?", "%", text, flags=re.IGNORECASE)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text, flags=re.IGNORECASE)
    text = " ".join(text.split()).strip()
    text = text if "=" in text else NAMED_BY_LETTERS.sub(_one_word, text)
    text = PLAIN_SET.sub(r"\\{\1\\}", APPROXIMATELY.sub("", text))
    text = EMPTY_SET.sub(r"\\emptyset", text)
    text = re.sub(r"^[a-zA-Z]\s*\\in\s*(?=[(\[\\])", "", text)
    text = re.sub(r"^(?:=|\\approx|\\implies|\\therefore)\s*", "", text)
    text = text.rstrip(".").strip() if not text.endswith("...") else text
    plain = " ".join(text.replace(WORD_MARK, " ").split())
    return PHRASES.get(plain.lower()) or number_of_words(plain) or text


def words(text: str) -> list[str]:
    """The words of a normal text, in lower case: what stood in \\text{}, and runs of letters that are no products of
    variables. A run of two or three letters is a product beside a digit, an operator or nothing but formulas."""
    found = [word.lower() for marked in text.split(WORD_MARK)[1::2] for word in re.findall(r"[^\W\d_]+", marked)]
    outside = " ".join(text.split(WORD_MARK)[::2])
    if REMAINDER.search(outside):
        found.append("r")
    runs = [run[0] for run in LETTERS.finditer(COMMAND.sub(" ", outside))]
    long = [run for run in runs if len(run) > 3 or (len(run) > 1 and run.lower() in SHORT_WORDS)]
    is_product = (len(runs) == 1 and len(runs[0]) < 3) or BESIDE_LETTERS.search(outside) is not None
    is_formula = is_product and not long and COUNTED.fullmatch(outside.strip()) is None
    is_simple = SIMPLE_QUANTITY.fullmatch(outside.strip()) is not None
    for run in runs:
        lower = run.lower()
        is_unit = lower in SHORT_UNITS and (is_simple or (len(run) > 1 and re.search(rf"[\d}})]\s*{run}\b", outside)))
        if run in long or is_unit or (len(run) > 1 and not is_formula):
            found.append(lower)
    return found


def plain_key(text: str) -> str:
    """Texts with equal keys are the same answer: a normal text without spaces, marks of words, and cases of words."""
    lowered = text.lower() if words(text) else text
    return re.sub(r"[\s\u241f]+", "", lowered)


def tokens(text: str) -> Iterator[str]:
    """The words and numbers of a normal text: words in lower case, units in one spelling, numbers as exact values."""
    for found in TOKEN.finditer(text):
        if found["number"]:
            yield str(Fraction(found["number"].rstrip(".")))
        elif found["word"]:
            word = found["word"].lower()
            if word not in ("a", "an", "the", "of"):
                yield "remainder" if word == "r" else UNITS.get(word, word)
        elif found[0] not in ",.;!?'\"()":
            yield found[0]


def unit_of(text: str) -> str:
    """A unit in one spelling: `cm^2`, `square centimeters`."""
    named = [word for word in re.findall(r"[^\W\d_]+", text.lower()) if word != "per"]
    names = [UNITS.get(word, word.removesuffix("s")) for word in named]
    powers = re.findall(r"\^\s*\{?(-?\d)\}?", text)
    if "square" in names or "cubic" in names:
        powers.append("2" if "square" in names else "3")
        names = [name for name in names if name not in ("square", "cubic")]
    unit = " ".join(names)
    return " ".join([COMPOUNDS.get(unit, unit), *(f"^{power}" for power in powers)])


def _in_brackets(text: str) -> bool:
    """Whether commas separate the entries of a tuple, set or interval."""
    return bool(re.search(r"[(\[{]\s*-?\d+,\s*-?\d+\s*[,)\]}\\]", text))


def _joined(match: re.Match[str]) -> str:
    return re.sub(r"[^\d]", "", match[0])


def _with_unit(match: re.Match[str]) -> str:
    number = match["number"].rstrip(",")
    rest = match["number"][len(number) :]
    return f"{match['sign']}{number} {WORD_MARK}{CURRENCIES[match['symbol']]}{WORD_MARK} {rest}"


def _fraction_sign(character: str) -> str:
    decomposed = unicodedata.decomposition(character)
    if not decomposed.startswith("<fraction>"):
        return character
    over, _, under = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"


def _one_word(match: re.Match[str]) -> str:
    """Letters that are no product: an angle, which reads the same from both ends, or a vector."""
    letters = min(match[2], match[2][::-1]) if match[1] == "angle" else match[2]
    return rf"\{match[1]} {WORD_MARK}{letters}{WORD_MARK}"


def _mixed(match: re.Match[str]) -> str:
    """A whole number and a fraction below 1 as one fraction."""
    whole, over, under = (int(group) for group in match.groups() if group)
    return rf"\frac{{{whole * under + over}}}{{{under}}}" if 0 < over < under else match[0]


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    if len(fixed) + len(period) > MAX_REPEATING:
        return match[0]
    value = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    value += Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _command(match: re.Match[str]) -> str:
    return rf"\{'infty' if match[1] == 'infinity' else match[1]} "
