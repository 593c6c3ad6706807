"""Compares expressions; imported in child processes only, which are killed if they take too long.

Nothing here may run text as code. math-verify parses LaTeX by its own grammar, but text can still reach `eval` in three
ways: plain expressions through sympy's `parse_expr`, which is not used here; numbers through `sympify`, which calls
`parse_expr`; and `lambdify`, which prints symbols, with names from the text, as Python. So sympy may only read numbers
and names here, and an audit hook stops these modules from compiling code.
"""

import logging
import re
import sys

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

from rlhf.engines.rewards.math_compare import UnreadableError, equal_answers

UNREAD = "unread"
# Units are compared before, and letters behind a number are variables here.
NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
LATEX = (LatexExtractionConfig(normalization_config=NORMALIZATION),)
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,1000}\.?[0-9]{0,1000}|\.[0-9]{1,1000})(?:[eE][+-]?[0-9]{1,3})?")
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
CODE_MAKERS = ("sympy.parsing", "sympy.core.sympify", "sympy.utilities.lambdify")
"""Modules that compile what they read or print; other code that sympy generates contains only counts."""


def judge(labels: list[str], answers: list[str]) -> list[dict[str, float]]:
    """The `score` of each answer, 1 if it equals its label, else 0; `unread` is 1 if one of the two cannot be read."""
    return [judge_one(label, answer) for label, answer in zip(labels, answers, strict=True)]


def judge_one(label: str, answer: str) -> dict[str, float]:
    try:
        return {"score": float(equal_answers(label, answer, are_equal)), UNREAD: 0.0}
    except (Exception, MemoryError):
        return {"score": 0.0, UNREAD: 1.0}


def are_equal(label: str, answer: str) -> bool:
    """Whether two formulas are mathematically equal."""
    ours, theirs = read(label), read(answer)
    if not any(map(is_formula, ours)) or not any(map(is_formula, theirs)):
        raise UnreadableError
    return bool(verify(ours, theirs, allow_set_relation_comp=True, timeout_seconds=None))


def is_formula(found: sympy.Basic | sympy.MatrixBase | str) -> bool:
    return isinstance(found, sympy.Basic | sympy.MatrixBase)


def read(text: str) -> list[sympy.Basic | sympy.MatrixBase | str]:
    found: list[sympy.Basic | sympy.MatrixBase | str] = parse(f"${text}$", LATEX, parsing_timeout=None)
    return found


def read_atom(text: str, **_options: object) -> sympy.Expr:
    """Replaces `parse_expr`: reads a number or the name of a symbol."""
    if INTEGER.fullmatch(text):
        return sympy.Integer(int(text))
    if DECIMAL.fullmatch(text):
        return sympy.Float(text)
    if text.isidentifier():
        return sympy.Symbol(text)
    raise SyntaxError("neither a number nor a name")


def refuse_code(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: no process is started, and nothing that sympy makes from an expression's text is compiled."""
    maker = sys._getframe(1).f_globals.get("__name__", "") if event == "compile" else ""
    if event in STARTS or maker.startswith(CODE_MAKERS):
        raise PermissionError("text is not run as code here")


# `sympify` looks up `parse_expr` there at each call.
sympy_parser.parse_expr = read_atom
# The parent enforces the timeout; the library would warn about each call without a timeout of its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)
sys.addaudithook(refuse_code)
